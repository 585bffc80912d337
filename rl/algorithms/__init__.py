"""Noise-space RL algorithms, one file each."""

from trimtab.rl.algorithms.base import Algorithm, AlgorithmConfig, Problem
from trimtab.rl.algorithms.best_of_n import BestOfN, BestOfNConfig
from trimtab.rl.algorithms.dsrl_na import DSRLNA, DSRLNAConfig
from trimtab.rl.algorithms.dsrl_sac import DSRLSAC, DSRLSACConfig
from trimtab.rl.algorithms.golden_ticket import GoldenTicketConfig
from trimtab.rl.algorithms.residual import Residual, ResidualConfig

__all__ = [
    "DSRLNA",
    "DSRLSAC",
    "Algorithm",
    "AlgorithmConfig",
    "BestOfN",
    "BestOfNConfig",
    "DSRLNAConfig",
    "DSRLSACConfig",
    "GoldenTicketConfig",
    "Problem",
    "Residual",
    "ResidualConfig",
]
