"""A VLA-JEPA of 0.1 M weights: the real Qwen3-VL, V-JEPA 2 and LeRobot's ``DiT-test`` preset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from trimtab.adapters.tiny._qwen3 import make_qwen3
from trimtab.adapters.tiny.parts import camera_features, make_config, save_policy


def build(folder: Path, cameras: int = 1, **fields: Any) -> dict[str, Any]:
    """Save the policy; its Qwen3-VL and V-JEPA 2 lie in ``folder/qwen`` and ``folder/vjepa``.

    Args:
        folder: where.
        cameras: number of cameras.
        fields: fields of ``VLAJEPAConfig`` that shall differ.
    """
    from transformers import Qwen3VLForConditionalGeneration

    torch.manual_seed(0)
    qwen = folder / "qwen"
    Qwen3VLForConditionalGeneration(make_qwen3(qwen)).save_pretrained(qwen)
    config = make_config(
        "vla_jepa",
        fields,
        **camera_features(cameras),
        qwen_model_name=str(qwen),
        jepa_encoder_name=str(folder / "vjepa"),
        enable_world_model=False,
        torch_dtype="float32",
        chunk_size=5,
        n_action_steps=3,
        num_inference_timesteps=4,
        num_embodied_action_tokens_per_instruction=4,
        num_action_tokens_per_timestep=2,
        action_model_type="DiT-test",
        action_num_layers=2,
        action_hidden_size=16,
        predictor_depth=1,
        predictor_num_heads=2,
        gripper_dim=2,
    )
    if config.enable_world_model:
        make_vjepa(folder / "vjepa")
    save_policy(folder, config)
    return {"backbone": str(qwen)}


def make_vjepa(folder: Path) -> None:
    """Save a narrow V-JEPA 2 and its video processor."""
    from transformers import VJEPA2Config, VJEPA2Model, VJEPA2VideoProcessor

    config = VJEPA2Config(
        crop_size=32,
        image_size=32,
        hidden_size=48,
        num_attention_heads=2,
        num_hidden_layers=1,
        pred_hidden_size=48,
        pred_num_attention_heads=2,
        pred_num_hidden_layers=1,
        num_pooler_layers=1,
    )
    VJEPA2Model(config).save_pretrained(folder)
    VJEPA2VideoProcessor().save_pretrained(folder)
