"""act, diffusion, pi0, pi05, smolvla: also to be timed, for they can be built with weights."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from trimtab.adapters.tiny.parts import camera_features
from trimtab.recipes.full_size.common import (
    CAMERA,
    Built,
    Sizes,
    assemble,
    assemble_weightless,
    inputs,
    make_config,
)

# SmolVLM2-500M, the backbone of lerobot/smolvla_base, by its published config.
SMOLVLM_500M: Sizes = {
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


def act(device: str, cameras: int) -> Built:
    """LeRobot's default sizes, on ALOHA's 14 joints."""
    features = camera_features(cameras, CAMERA, state_dim=14, action_dim=14)
    config = make_config("act", features, device, pretrained_backbone_weights=None)
    return assemble(config, device, lambda: inputs(config))


def diffusion(device: str, cameras: int) -> Built:
    """LeRobot's default sizes, on pusht's one small camera, with ten steps of DDIM."""
    features = camera_features(1, (96, 96), state_dim=2, action_dim=2)
    config = make_config(
        "diffusion",
        features,
        device,
        pretrained_backbone_weights=None,
        noise_scheduler_type="DDIM",
        num_inference_steps=10,
    )
    return assemble(config, device, lambda: inputs(config, history=config.n_obs_steps))


def pi(policy_type: str) -> Callable[[str, int], Built]:
    """pi0 or pi05; LeRobot's code holds their sizes."""

    def build(device: str, cameras: int) -> Built:
        features = camera_features(cameras, CAMERA, state_dim=14, action_dim=14)
        config = make_config(policy_type, features, device)
        return assemble(config, device, lambda: inputs(config, config.tokenizer_max_length))

    return build


def smolvla(device: str, cameras: int) -> Built:
    """lerobot/smolvla_base; its vision tower looks at values, so it has some also where only counted."""
    from trimtab.adapters.tiny.smolvla import make_vlm

    with tempfile.TemporaryDirectory() as folder:
        vlm = make_vlm(Path(folder), SMOLVLM_500M)
        features = camera_features(cameras, CAMERA, state_dim=6, action_dim=6)
        where = "cpu" if device == "meta" else device
        config = make_config("smolvla", features, where, vlm_model_name=str(vlm), load_vlm_weights=False)
        if device == "meta":
            return assemble_weightless(config, batch=inputs(config, config.tokenizer_max_length))
        return assemble(config, device, lambda: inputs(config, config.tokenizer_max_length))
