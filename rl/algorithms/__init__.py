"""Noise-space RL algorithms, one file each."""

from trimtab.rl.algorithms.base import Algorithm, AlgorithmConfig
from trimtab.rl.algorithms.dsrl_sac import DSRLSAC, DSRLSACConfig

__all__ = ["DSRLSAC", "Algorithm", "AlgorithmConfig", "DSRLSACConfig"]
