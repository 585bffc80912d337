"""A LeRobot ACTPolicy with a narrow transformer; with cameras, ResNet18 (11 M weights) sees for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lerobot.configs import FeatureType, PolicyFeature

from trimtab.adapters.tiny.parts import camera_features, make_config, save_policy


def build(folder: Path, cameras: int = 1, env_dim: int = 0, **fields: Any) -> None:
    """Save the policy.

    Args:
        folder: where.
        cameras: how many it looks at; may be 0 with an environment state.
        env_dim: size of an environment state; 0 for none.
        fields: fields of ``ACTConfig`` that shall differ.
    """
    features = camera_features(cameras)
    if env_dim:
        state = PolicyFeature(FeatureType.ENV, (env_dim,))
        features["input_features"]["observation.environment_state"] = state
    config = make_config(
        "act",
        fields,
        **features,
        chunk_size=8,
        n_action_steps=4,
        pretrained_backbone_weights=None,
        dim_model=32,
        n_heads=2,
        dim_feedforward=64,
        n_encoder_layers=2,
        n_vae_encoder_layers=1,
        latent_dim=6,
    )
    save_policy(folder, config)
