"""A FastWAM with two cameras: the real Wan experts, VAE and text encoder, narrow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from trimtab.adapters.tiny._wan import LATENT_CHANNELS, TEXT_DIM, save_wan_parts
from trimtab.adapters.tiny.parts import ACTION_DIM, STATE_DIM, camera_features, randomise, save, statistics


def build(folder: Path, **fields: Any) -> dict[str, Any]:
    """Save the policy; the VAE, text encoder and tokenizer, outside a checkpoint, lie in ``folder/wan``."""
    from lerobot.policies.factory import make_pre_post_processors
    from lerobot.policies.fastwam.configuration_fastwam import FastWAMConfig

    from trimtab.adapters.lerobot.fastwam import FastWAMAdapter

    wan = folder / "wan"
    save_wan_parts(wan)
    expert = {
        "num_heads": 2,
        "attn_head_dim": 12,
        "num_layers": 2,
        "ffn_dim": 32,
        "freq_dim": 16,
        "eps": 1e-6,
    }
    video = {
        **expert,
        "hidden_dim": 24,
        "text_dim": TEXT_DIM,
        "in_dim": LATENT_CHANNELS,
        "out_dim": LATENT_CHANNELS,
        "patch_size": [1, 2, 2],
        "seperated_timestep": True,
        "video_attention_mask_mode": "first_frame_causal",
    }
    action = {**expert, "hidden_dim": 16, "text_dim": TEXT_DIM, "action_dim": ACTION_DIM}
    values: dict[str, Any] = {
        **camera_features(cameras=2, size=32),
        "device": "cpu",
        "push_to_hub": False,
        "text_encoder_model_id": str(wan),
        "tokenizer_model_id": str(wan / "tokenizer"),
        "tokenizer_max_len": 24,
        "torch_dtype": "float32",
        "image_size": (32, 64),
        "action_dim": ACTION_DIM,
        "proprio_dim": STATE_DIM,
        "action_horizon": 8,
        "n_action_steps": 5,
        "num_inference_steps": 3,
        "video_dit_config": video,
        "action_dit_config": action,
    }
    config = FastWAMConfig(**{**values, **fields})
    torch.manual_seed(0)
    policy = FastWAMAdapter.build(config)
    randomise(policy)
    save(folder, policy, *make_pre_post_processors(config, dataset_stats=statistics(config)))
    return {"backbone": str(wan)}
