"""The point problem on a machine where things go wrong."""

import os
import resource
import time
from contextlib import contextmanager
from dataclasses import dataclass

import gymnasium as gym
import numpy as np
from lerobot.envs.configs import EnvConfig

from tests.helpers.point import PointConfig, PointEnv


class FaultyEnv(PointEnv):
    """In the fifth step of every fourth episode, by seed, ``fault`` happens; "reset ..." at its beginning."""

    def __init__(self, limit, fault, slow=0.0):
        super().__init__(limit)
        self.fault, self.slow = fault, slow

    def reset(self, *, seed=None, options=None):
        self.due = seed % 4 == 3 or self.fault.startswith("always")
        observation, info = super().reset(seed=seed)
        if self.due and "reset" in self.fault:
            self._happen(self.fault.split()[-1], observation)
        return observation, info

    def step(self, action):
        observation, reward, *rest = super().step(action)
        time.sleep(self.slow)
        if self.due and self.t == 5 and "reset" not in self.fault:
            fault = self.fault.removeprefix("always ")
            self._happen(fault, observation)
            if fault == "reward":
                reward = np.inf
        return observation, reward, *rest

    def _happen(self, fault, observation):
        if fault == "die":
            os._exit(7)
        elif fault == "hang":
            time.sleep(600)
        elif fault == "raise":
            raise ValueError("the physics exploded")
        elif fault == "observation":
            observation["agent_pos"] = np.array([np.nan])


@EnvConfig.register_subclass("test_faulty")
@dataclass
class FaultyConfig(PointConfig):
    fault: str = "none"
    slow: float = 0.0

    def create_envs(self, n_envs, use_async_envs=False):
        make = [lambda: FaultyEnv(self.limit, self.fault, self.slow)] * n_envs
        return {"test_faulty": {0: gym.vector.SyncVectorEnv(make)}}


@contextmanager
def files_of_at_most(size):
    """A disk on which no file can grow further: stands in for a full one, which takes a mount to make."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
