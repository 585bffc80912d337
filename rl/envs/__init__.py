"""Chunk environments. Importing this registers trimtab's own types with LeRobot."""

from trimtab.rl.envs import gym, libero, metaworld, nothing
from trimtab.rl.envs.robot import config as robot

__all__ = ["gym", "libero", "metaworld", "nothing", "robot"]
