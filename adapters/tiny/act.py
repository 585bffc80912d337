"""A LeRobot ACTPolicy with a narrow transformer; with cameras, ResNet18 (11 M weights) sees for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lerobot.configs import FeatureType, PolicyFeature

from trimtab.adapters.tiny.parts import camera_features, save, statistics


def build(folder: Path, cameras: int = 1, env_dim: int = 0, **fields: Any) -> None:
    """Save the policy.

    Args:
        folder: where.
        cameras: how many it looks at; may be 0 with an environment state.
        env_dim: size of an environment state; 0 for none.
        fields: fields of ``ACTConfig`` that shall differ.
    """
    from lerobot.policies.act.configuration_act import ACTConfig
    from lerobot.policies.act.modeling_act import ACTPolicy
    from lerobot.policies.factory import make_pre_post_processors

    features = camera_features(cameras)
    if env_dim:
        features["input_features"]["observation.environment_state"] = PolicyFeature(
            FeatureType.ENV, (env_dim,)
        )
    values: dict[str, Any] = {
        **features,
        "device": "cpu",
        "push_to_hub": False,
        "chunk_size": 8,
        "n_action_steps": 4,
        "pretrained_backbone_weights": None,
        "dim_model": 32,
        "n_heads": 2,
        "dim_feedforward": 64,
        "n_encoder_layers": 2,
        "n_vae_encoder_layers": 1,
        "latent_dim": 6,
    }
    config = ACTConfig(**{**values, **fields})
    torch.manual_seed(0)
    policy = ACTPolicy(config)
    save(folder, policy, *make_pre_post_processors(config, dataset_stats=statistics(config)))
