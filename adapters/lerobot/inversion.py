"""Denoising loops backwards: from a chunk to the noise that makes it."""

from collections.abc import Callable

import torch
from torch import Tensor

# Chunks (B, steps, dim) at time (B,) -> how they flow.
Velocity = Callable[[Tensor, Tensor], Tensor]
FARTHEST = 3.0  # by what factor a rate may differ from the first


def solve(step: Callable[[Tensor], Tensor], y: Tensor, slope: float, iterations: int) -> Tensor:
    """The ``x`` with ``step(x) = y``, both (B, ...), where ``step`` is near ``slope * x``.

    Fixed-point iteration ``x := x + rate * (y - step(x))`` from ``x = y``. Its rate is first ``1 / slope``
    (Picard's), then for each row that of the last secant (Barzilai and Borwein, IMA J. Numer. Anal. 8, 1988):
    a policy that makes nearly the same chunk of many noises would be slow without it.
    """

    def dot(one: Tensor, other: Tensor) -> Tensor:
        return (one * other).flatten(1).sum(1).view(-1, *[1] * (y.ndim - 1))

    x, rate, before = y, torch.full_like(dot(y, y), 1.0 / slope), None
    for _ in range(iterations):
        error = y - step(x)
        if before is not None:
            moved, gained = x - before[0], before[1] - error
            rate = dot(moved, gained) / dot(gained, gained).clamp_min(1e-12)
            rate = rate.clamp(1.0 / slope / FARTHEST, FARTHEST / slope)
        before = x, error
        x = x + rate * error
    return x


def reverse_euler(velocity: Velocity, chunk: Tensor, steps: int, iterations: int) -> Tensor:
    """The noise of which LeRobot's ``euler_integrate`` makes ``chunk`` (B, ...) in so many ``steps``."""
    h, x = -1.0 / steps, chunk
    for step in reversed(range(steps)):
        time = torch.full((len(x),), 1.0 + step * h, device=x.device)
        x = solve(lambda x, time=time: x + h * velocity(x, time), x, 1.0, iterations)  # type: ignore[misc]
    return x
