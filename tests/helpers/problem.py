"""A problem that an algorithm is built for, on the CPU."""

from accelerate import Accelerator

from trimtab.rl.algorithms import Problem


def problem(feature_dim, space, chunk_size=0, bounds=(-20.0, 0.0), observe=None):
    return Problem(feature_dim, space, Accelerator(cpu=True), bounds, chunk_size, observe)
