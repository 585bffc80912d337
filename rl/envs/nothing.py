"""``--env.type=none``: no environment. What is learnt comes from demonstrations alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from lerobot.envs.configs import EnvConfig
from lerobot.utils.constants import OBS_ENV_STATE, OBS_IMAGE, OBS_IMAGES, OBS_STATE

from trimtab.rl.envs.chunk import RawObservation, stack_observations
from trimtab.rl.envs.examine import Description, Findings
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


class NoVectorEnv(contextlib.AbstractContextManager["NoVectorEnv"]):
    """In the place of a ``ChunkVectorEnv`` where there is none: it tells shapes, and nothing starts."""

    empty = True
    num_envs, attended, repeatable, stopped = 1, True, False, ""

    def __init__(self, config: NoEnvConfig, n_obs_steps: int) -> None:
        task = config.task or ""
        blank = stack_observations([blank_observation(config.wanted or {})] * n_obs_steps)
        self.descriptions = [Description(task, task or config.type, False, [], blank)]
        self.task_descriptions, self.task_names = [task], [task or config.type]
        self.episodes = 0
        self.stopping: Callable[[], bool] = lambda: False
        self.on_success_key: Callable[[str], None] = lambda key: None

    def examine(self, chunk: np.ndarray, move: bool = False) -> Findings:
        return Findings(repeatable=False)

    def keep(self, *where: Any) -> None:
        """There is nothing to keep."""

    def note(self, **arrays: np.ndarray) -> None:
        """Nothing runs."""

    def calls(self, seconds: float) -> bool:
        return False

    def timing(self) -> dict[str, float]:
        return {}

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """There is nothing to close."""


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
