"""A FastWAM with two cameras: the real Wan experts, VAE and text encoder, narrow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trimtab.adapters.tiny._wan import LATENT_CHANNELS, TEXT_DIM, save_wan_parts
from trimtab.adapters.tiny.parts import ACTION_DIM, STATE_DIM, camera_features, make_config, save_policy

EXPERT = {
    "num_heads": 2,
    "attn_head_dim": 12,
    "num_layers": 2,
    "ffn_dim": 32,
    "freq_dim": 16,
    "text_dim": TEXT_DIM,
    "eps": 1e-6,
}
VIDEO = {
    **EXPERT,
    "hidden_dim": 24,
    "in_dim": LATENT_CHANNELS,
    "out_dim": LATENT_CHANNELS,
    "patch_size": [1, 2, 2],
    "seperated_timestep": True,
    "video_attention_mask_mode": "first_frame_causal",
}


def build(folder: Path, **fields: Any) -> dict[str, Any]:
    """Save the policy; the VAE, text encoder and tokenizer, outside a checkpoint, lie in ``folder/wan``."""
    from trimtab.adapters.lerobot.fastwam import FastWAMAdapter

    wan = folder / "wan"
    save_wan_parts(wan)
    config = make_config(
        "fastwam",
        fields,
        **camera_features(cameras=2, size=32),
        text_encoder_model_id=str(wan),
        tokenizer_model_id=str(wan / "tokenizer"),
        tokenizer_max_len=24,
        torch_dtype="float32",
        image_size=(32, 64),
        action_dim=ACTION_DIM,
        proprio_dim=STATE_DIM,
        action_horizon=8,
        n_action_steps=5,
        num_inference_steps=3,
        video_dit_config=VIDEO,
        action_dit_config={**EXPERT, "hidden_dim": 16, "action_dim": ACTION_DIM},
    )
    save_policy(folder, config, FastWAMAdapter.build, no_zeros=True)
    return {"backbone": str(wan)}
