"""Chunk environments. Importing this registers trimtab's own types with LeRobot."""

from trimtab.rl.envs import gym, libero, metaworld

__all__ = ["gym", "libero", "metaworld"]
