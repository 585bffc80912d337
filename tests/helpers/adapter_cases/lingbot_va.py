"""LingBot-VA: LeRobot draws the video's noise, then the actions'; the first chunk after a reset."""

from typing import Any

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
