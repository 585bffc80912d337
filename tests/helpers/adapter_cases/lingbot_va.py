"""LingBot-VA: LeRobot draws the video's noise, then the actions'; the first chunk after a reset."""

from typing import Any

import torch
from torch import Tensor

from tests.helpers.adapter_cases import Case
from trimtab.adapters.lerobot.injection import NoiseInjector


def first_chunk(adapter: Any, batch: dict[str, Any], noise: Tensor) -> Tensor:
    """LeRobot's chunk, both draws replaced."""
    adapter.policy.reset()
    now = {key: value[:, -1] if isinstance(value, Tensor) else value for key, value in batch.items()}
    with NoiseInjector([adapter.video_noise, noise]) as injector:
        chunk = adapter.policy.predict_action_chunk(now)
    injector.check("lingbot_va")
    return chunk


ROBOTWIN = {"camera_layout": "robotwin_tshape", "height": 64, "width": 64}
CASES = [
    Case("lingbot_va", first_chunk, inert=12 * 3),
    Case("lingbot_va", first_chunk, {"guidance_scale": 1.0}, inert=12 * 3),
    Case("lingbot_va", first_chunk, ROBOTWIN, inert=12 * 3),
]


def frames(adapter, count, seed=0):
    """``count`` single observations (1, ...) of an episode."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {key: feature.shape for key, feature in adapter.config.input_features.items()}
    return [
        {
            **{k: torch.rand((1, *s), generator=generator) for k, s in shapes.items()},
            "task": ["push the cube"],
        }
        for _ in range(count)
    ]


def history(adapter, episode, end):
    """The preprocessed history that ends with ``episode[end]``, as a chunked environment keeps it."""
    chosen = [episode[max(0, end - back)] for back in reversed(range(adapter.n_obs_steps))]
    keys = adapter.config.input_features
    stacked = {key: torch.stack([frame[key] for frame in chosen], 1) for key in keys}
    return adapter.preprocess({**stacked, "task": episode[0]["task"]})
