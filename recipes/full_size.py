"""Policies at their published size, with random weights or none: what encoding and denoising really cost.

On the meta device there are no weights at all and only operations are counted; SmolVLA's vision tower looks
at its input's values there, so it is built on the CPU.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.adapters.base import PolicyAdapter, adapter_class
from trimtab.recipes.tiny.parts import camera_features

# SmolVLM2-500M, the backbone of lerobot/smolvla_base, by its published config.
SMOLVLM_500M: dict[str, dict[str, Any]] = {
    "text": {
        "hidden_size": 960,
        "intermediate_size": 2560,
        "num_hidden_layers": 32,
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
        "head_dim": 64,
        "vocab_size": 49280,
    },
    "vision": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 512,
        "patch_size": 16,
    },
    "model": {"scale_factor": 4},
}

Built = tuple[PolicyAdapter, dict[str, Any]]


def full_size(policy_type: str, device: str = "meta", cameras: int = 2) -> Built:
    """An adapter at published size, and a preprocessed batch of one observation.

    Args:
        policy_type: a key of ``FULL_SIZE``.
        device: ``meta`` counts, anything else runs; SmolVLA runs on the CPU instead of ``meta``.
        cameras: of 480 x 640 pixels each (``diffusion``: one of 96 x 96, as on pusht).
    """
    return FULL_SIZE[policy_type](device, cameras)


def _config(policy_type: str, device: str, features: dict[str, Any], **fields: Any) -> Any:
    from lerobot.policies.factory import make_policy_config

    config = make_policy_config(policy_type, **features, device="cpu", push_to_hub=False, **fields)
    config.device = device  # LeRobot would not take "meta" before
    return config


def _assemble(config: Any, device: str, batch: Callable[[], dict[str, Tensor]]) -> Built:
    cls: Any = adapter_class(config.type)
    torch.manual_seed(0)
    with torch.device(device):
        policy = cls.build(config).eval().requires_grad_(False)
        return cls(policy, None, None), batch()


def _inputs(config: Any, tokens: int = 0, history: int = 0) -> dict[str, Tensor]:
    """A batch of one: every input feature, and language tokens."""
    lead = (1, history) if history else (1,)
    batch = {key: torch.rand(*lead, *feature.shape) for key, feature in config.input_features.items()}
    if tokens:
        batch["observation.language.tokens"] = torch.ones(*lead, tokens, dtype=torch.long)
        batch["observation.language.attention_mask"] = torch.ones(*lead, tokens, dtype=torch.bool)
    return batch


def _pi(policy_type: str) -> Callable[[str, int], Built]:
    def build(device: str, cameras: int) -> Built:
        features = camera_features(cameras, (480, 640), state_dim=14, action_dim=14)
        config = _config(policy_type, device, features)
        return _assemble(config, device, lambda: _inputs(config, config.tokenizer_max_length))

    return build


def _smolvla(device: str, cameras: int) -> Built:
    from trimtab.recipes.tiny.smolvla import make_vlm

    device = "cpu" if device == "meta" else device
    with tempfile.TemporaryDirectory() as folder:
        vlm = make_vlm(Path(folder), SMOLVLM_500M)
        features = camera_features(cameras, (480, 640), state_dim=6, action_dim=6)
        config = _config("smolvla", device, features, vlm_model_name=str(vlm), load_vlm_weights=False)
        return _assemble(config, device, lambda: _inputs(config, config.tokenizer_max_length))


def _diffusion(device: str, cameras: int) -> Built:
    features = camera_features(1, (96, 96), state_dim=2, action_dim=2)
    config = _config(
        "diffusion",
        device,
        features,
        pretrained_backbone_weights=None,
        noise_scheduler_type="DDIM",
        num_inference_steps=10,
    )
    return _assemble(config, device, lambda: _inputs(config, history=config.n_obs_steps))


def _act(device: str, cameras: int) -> Built:
    features = camera_features(cameras, (480, 640), state_dim=14, action_dim=14)
    config = _config("act", device, features, pretrained_backbone_weights=None)
    return _assemble(config, device, lambda: _inputs(config))


FULL_SIZE: dict[str, Callable[[str, int], Built]] = {
    "act": _act,
    "diffusion": _diffusion,
    "pi0": _pi("pi0"),
    "pi05": _pi("pi05"),
    "smolvla": _smolvla,
}
