"""Chunk environments. Importing this registers trimtab's own types with LeRobot."""

from trimtab.rl.envs import gym, libero, metaworld, nothing
from trimtab.rl.envs.robot import config

__all__ = ["config", "gym", "libero", "metaworld", "nothing"]
