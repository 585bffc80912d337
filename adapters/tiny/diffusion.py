"""A LeRobot DiffusionPolicy, state-based or with a camera; ResNet18 sees for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lerobot.configs import FeatureType, PolicyFeature

from trimtab.adapters.tiny.parts import save, statistics


def build(folder: Path, images: bool = False, scheduler: str = "DDIM", **fields: Any) -> None:
    """Save the policy.

    Args:
        folder: where.
        images: look at a camera instead of an environment state.
        scheduler: ``DDIM`` or ``DDPM``.
        fields: fields of ``DiffusionConfig`` that shall differ.
    """
    from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
    from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy
    from lerobot.policies.factory import make_pre_post_processors

    features = {"observation.state": PolicyFeature(FeatureType.STATE, (2,))}
    if images:
        features["observation.image"] = PolicyFeature(FeatureType.VISUAL, (3, 64, 64))
    else:
        features["observation.environment_state"] = PolicyFeature(FeatureType.ENV, (16,))
    values: dict[str, Any] = {
        "input_features": features,
        "output_features": {"action": PolicyFeature(FeatureType.ACTION, (2,))},
        "device": "cpu",
        "push_to_hub": False,
        "n_obs_steps": 2,
        "horizon": 8,
        "n_action_steps": 3,
        "down_dims": (16, 32),
        "diffusion_step_embed_dim": 16,
        "noise_scheduler_type": scheduler,
        "num_train_timesteps": 20,
        "num_inference_steps": None if scheduler == "DDPM" else 4,
        "pretrained_backbone_weights": None,
        "use_group_norm": True,
    }
    config = DiffusionConfig(**{**values, **fields})
    torch.manual_seed(0)
    policy = DiffusionPolicy(config)
    save(folder, policy, *make_pre_post_processors(config, dataset_stats=statistics(config)))
