"""A LingBot-VA with two cameras: the real dual-stream transformer, VAE and text encoder, narrow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trimtab.adapters.tiny._wan import LATENT_CHANNELS, TEXT_DIM, save_wan_parts
from trimtab.adapters.tiny.parts import camera_features, make_config, save_policy


def build(folder: Path, **fields: Any) -> dict[str, Any]:
    """Save the policy; the VAE, text encoder and tokenizer, outside a checkpoint, lie in ``folder/wan``."""
    wan = folder / "wan"
    save_wan_parts(wan)
    features = camera_features(3 if fields.get("camera_layout") == "robotwin_tshape" else 2, size=32)
    config = make_config(
        "lingbot_va",
        fields,
        **features,
        wan_pretrained_path=str(wan),
        dtype="float32",
        obs_cam_keys=[key for key in features["input_features"] if "images" in key],
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        action_dim=6,
        used_action_channel_ids=[0, 2, 5],
        text_dim=TEXT_DIM,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        height=32,
        width=32,
        action_per_frame=4,
        frame_chunk_size=3,
        attn_window=6,
        num_inference_steps=2,
        action_num_inference_steps=3,
        max_sequence_length=12,
    )
    save_policy(folder, config, no_zeros=True)
    return {"backbone": str(wan)}
