"""Chunk environments. Importing this registers trimtab's own types with LeRobot."""

from trimtab.rl.runs.imports import quick_imports

with quick_imports():  # the first of a simulator's worker
    from trimtab.rl.envs import gym, libero, metaworld, nothing
    from trimtab.rl.envs.robot import config

__all__ = ["config", "gym", "libero", "metaworld", "nothing"]
