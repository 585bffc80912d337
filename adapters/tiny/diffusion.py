"""A LeRobot DiffusionPolicy, state-based or with a camera; ResNet18 sees for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lerobot.configs import FeatureType, PolicyFeature

from trimtab.adapters.tiny.parts import camera_features, make_config, save_policy


def build(folder: Path, images: bool = False, scheduler: str = "DDIM", **fields: Any) -> None:
    """Save the policy.

    Args:
        folder: where.
        images: look at a camera instead of an environment state.
        scheduler: ``DDIM`` or ``DDPM``.
        fields: fields of ``DiffusionConfig`` that shall differ.
    """
    features = camera_features(int(images), state_dim=2, action_dim=2)
    if not images:
        state = PolicyFeature(FeatureType.ENV, (16,))
        features["input_features"]["observation.environment_state"] = state
    config = make_config(
        "diffusion",
        fields,
        **features,
        n_obs_steps=2,
        horizon=8,
        n_action_steps=3,
        down_dims=(16, 32),
        diffusion_step_embed_dim=16,
        noise_scheduler_type=scheduler,
        num_train_timesteps=20,
        num_inference_steps=None if scheduler == "DDPM" else 4,
        pretrained_backbone_weights=None,
        use_group_norm=True,
    )
    save_policy(folder, config)
