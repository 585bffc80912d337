"""Chunk environments. Importing this registers trimtab's own types with LeRobot."""

from trimtab.rl.envs import libero, metaworld

__all__ = ["libero", "metaworld"]
