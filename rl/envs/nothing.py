"""``--env.type=none``: no environment. What is learnt comes from demonstrations alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from lerobot.envs.configs import EnvConfig
from lerobot.utils.constants import OBS_ENV_STATE, OBS_IMAGE, OBS_IMAGES, OBS_STATE

from trimtab.rl.envs.base import VectorEnv
from trimtab.rl.envs.chunk import RawObservation, stack_observations
from trimtab.rl.envs.examine import Description
from trimtab.rl.envs.one_task import OneTaskConfig


@EnvConfig.register_subclass("none")
@dataclass
class NoEnvConfig(OneTaskConfig):
    """No environment: for learning from demonstrations, with --train.env_steps=0."""

    # The instruction of the demonstrations.
    task: str | None = None

    attended: ClassVar[bool] = True

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        return {}

    def make_vector_env(self, n_obs_steps: int) -> NoVectorEnv:
        return NoVectorEnv(self, n_obs_steps)


class NoVectorEnv(VectorEnv):
    """It tells shapes, and nothing starts."""

    attended = empty = True

    def __init__(self, config: NoEnvConfig, n_obs_steps: int) -> None:
        super().__init__()
        task = config.task or ""
        blank = stack_observations([blank_observation(config.wanted or {})] * n_obs_steps)
        self.descriptions = [Description(task, task or config.type, False, [], blank)]


def blank_observation(features: dict[str, tuple[int, ...]]) -> RawObservation:
    """Zeros of the shapes of a policy's input features, as LeRobot's environments name them."""
    found: RawObservation = {}
    for name, shape in features.items():
        image = np.zeros((*shape[1:], shape[0]), np.uint8) if len(shape) == 3 else None
        if image is not None and name == OBS_IMAGE:
            found["pixels"] = image
        elif image is not None:
            found.setdefault("pixels", {})[name.removeprefix(f"{OBS_IMAGES}.")] = image
        elif name in (OBS_STATE, OBS_ENV_STATE):
            key = "agent_pos" if name == OBS_STATE else "environment_state"
            found[key] = np.zeros(shape, np.float32)
    return found
