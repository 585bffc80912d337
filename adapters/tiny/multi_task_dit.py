"""A multi-task DiT of 70,000 weights: the real CLIP classes, narrow, and a two-layer transformer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from trimtab.adapters.tiny.parts import Sizes, camera_features, make_config, save_policy, word_tokenizer


def build(folder: Path, cameras: int = 1, **fields: Any) -> dict[str, Any]:
    """Save the policy; its CLIP, with weights and tokenizer, lies in ``folder/clip``.

    Args:
        folder: where.
        cameras: how many it looks at.
        fields: fields of ``MultiTaskDiTConfig`` that shall differ.
    """
    from transformers import CLIPModel

    clip = folder / "clip"  # LeRobot insists on "clip" in the path
    clip_config = make_clip(clip)
    torch.manual_seed(0)
    CLIPModel(clip_config).save_pretrained(clip)
    config = make_config(
        "multi_task_dit",
        fields,
        **camera_features(cameras),
        n_obs_steps=2,
        horizon=8,
        n_action_steps=4,
        objective="flow_matching",
        num_integration_steps=3,
        num_train_timesteps=20,
        hidden_dim=32,
        num_layers=2,
        num_heads=2,
        timestep_embed_dim=16,
        vision_encoder_name=str(clip),
        text_encoder_name=str(clip),
        image_crop_shape=(64, 64),
        tokenizer_max_length=12,
    )
    save_policy(folder, config, no_zeros=True)  # adaLN starts at zero: no observation would matter
    return {"backbone": str(clip)}


SIDE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": 16,
}
NARROW: Sizes = {
    "text": {**SIDE, "max_position_embeddings": 12},
    "vision": {**SIDE, "image_size": 64, "patch_size": 16},
}


def make_clip(folder: Path, sizes: Sizes = NARROW) -> Any:
    """Save config and tokenizer of a CLIP without weights.

    Args:
        folder: where.
        sizes: fields of the text and vision configs.

    Returns:
        The ``CLIPConfig``.
    """
    from transformers import CLIPConfig

    text = {
        "vocab_size": len(word_tokenizer(folder)),
        "eos_token_id": 2,  # as OpenAI's configs have it: CLIP then pools at the largest token id
        "pad_token_id": 0,
        **sizes["text"],
    }
    config = CLIPConfig(
        text_config=text, vision_config=sizes["vision"], projection_dim=text["projection_dim"]
    )
    config.save_pretrained(folder)
    return config
