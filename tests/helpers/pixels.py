"""The problem of ``point.py`` as a camera sees it: where point and goal are is in the pixels alone."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig

from tests.helpers.point import PointAdapter, PointEnv
from trimtab.adapters import Conditioning, PolicyAdapter

SIDE = 16
CAMERA = "observation.image"


def draw(x, goal):
    """(SIDE, SIDE, 3) uint8: a red bar at ``x``, a green one at ``goal``, blurred over two columns."""
    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    for channel, place in enumerate((x, goal)):
        column = np.clip((place + 1.4) / 2.8, 0, 1) * (SIDE - 2)
        left = int(column)
        image[:, left, channel] = round(255 * (1 - column + left))
        image[:, left + 1, channel] = 255 - image[0, left, channel]
    return image


class PixelPointEnv(PointEnv):
    observation_space = gym.spaces.Dict({"pixels": gym.spaces.Box(0, 255, (SIDE, SIDE, 3), np.uint8)})

    def _observation(self):
        return {"pixels": draw(self.x, self.goal)}


@EnvConfig.register_subclass("test_pixel_point")
@dataclass
class PixelPointConfig(EnvConfig):
    task: str | None = "point"
    limit: int = 13
    features: dict = field(default_factory=dict)
    features_map: dict = field(default_factory=dict)

    @property
    def gym_kwargs(self):
        return {}

    def create_envs(self, n_envs, use_async_envs=False):
        return {"point": {0: gym.vector.SyncVectorEnv([lambda: PixelPointEnv(self.limit)] * n_envs)}}


class PixelPointAdapter(PointAdapter):
    """A frozen policy that finds the point in the image, and offers no features to steer by."""

    def __init__(self):
        super().__init__()
        camera = PolicyFeature(FeatureType.VISUAL, (3, SIDE, SIDE))
        self.policy.config = SimpleNamespace(input_features={CAMERA: camera})

    def encode(self, batch):
        light = batch[CAMERA][:, -1].float().mean(2)[:, :2]  # (B, 2, SIDE), of each column
        columns = torch.arange(SIDE, dtype=torch.float32)
        place = (light * columns).sum(-1) / light.sum(-1).clamp_min(1e-6)
        return Conditioning({"state": place / (SIDE - 2) * 2.8 - 1.4})

    features = PolicyAdapter.features
