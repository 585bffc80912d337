"""Shared fixtures: small real policies, made once per session."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")

import pytest
import torch

from trimtab.recipes.console import quiet

quiet()
torch.set_num_threads(1)

TASKS = "button-press-topdown-v3,drawer-close-v3"


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory):
    """An embedded base of two tasks, cloned for a few steps: real parts, no skill."""
    from trimtab.recipes.metaworld.base import BaseConfig, make_base
    from trimtab.recipes.metaworld.cloning import CloningConfig
    from trimtab.recipes.metaworld.demonstrators import Operator

    config = BaseConfig(
        tasks=TASKS,
        demonstrators={"button-press-topdown-v3": Operator("blind_spot", 0.5, 0.14)},
        episodes=3,
        episode_length=60,
        cloning=CloningConfig(steps=30, batch_size=16),
    ).resolved()
    folder = tmp_path_factory.mktemp("bases") / "tiny"
    make_base(config, folder)
    return folder


def make_diffusion(
    folder,
    n_obs_steps=2,
    images=False,
    scheduler="DDIM",
    state_dim=2,
    env_dim=16,
    action_dim=2,
    horizon=8,
    n_action_steps=3,
    group_norm=True,
):
    """Save a random LeRobot DiffusionPolicy with its processors, as `lerobot-train` would."""
    from lerobot.configs import FeatureType, PolicyFeature
    from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
    from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy
    from lerobot.policies.factory import make_pre_post_processors

    features = {"observation.state": PolicyFeature(FeatureType.STATE, (state_dim,))}
    if images:
        features["observation.image"] = PolicyFeature(FeatureType.VISUAL, (3, 64, 64))
    else:
        features["observation.environment_state"] = PolicyFeature(FeatureType.ENV, (env_dim,))
    config = DiffusionConfig(
        input_features=features,
        output_features={"action": PolicyFeature(FeatureType.ACTION, (action_dim,))},
        device="cpu",
        push_to_hub=False,
        n_obs_steps=n_obs_steps,
        horizon=horizon,
        n_action_steps=n_action_steps,
        down_dims=(16, 32),
        diffusion_step_embed_dim=16,
        noise_scheduler_type=scheduler,
        num_train_timesteps=20,
        num_inference_steps=None if scheduler == "DDPM" else 4,
        pretrained_backbone_weights=None,
        use_group_norm=group_norm,
    )
    torch.manual_seed(0)
    policy = DiffusionPolicy(config)
    generator = torch.Generator().manual_seed(1)
    stats = {}
    for key, feature in {**config.input_features, **config.output_features}.items():
        shape = (3, 1, 1) if feature.type is FeatureType.VISUAL else feature.shape
        low = -torch.rand(shape, generator=generator) - 0.5
        stats[key] = {"min": low, "max": -low + 0.3, "mean": low * 0, "std": torch.ones(shape)}
    pre, post = make_pre_post_processors(config, dataset_stats=stats)
    policy.save_pretrained(folder)
    pre.save_pretrained(folder)
    post.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pusht_policy(tmp_path_factory):
    """A random state-based policy for LeRobot's pusht, with a history of two observations."""
    return make_diffusion(tmp_path_factory.mktemp("pusht"))
