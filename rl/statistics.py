"""Intervals of success rates."""

from __future__ import annotations

import math


def wilson_interval(successes: int, episodes: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson score interval of a success rate (Wilson 1927); 95 % at the default ``z``.

    Raises:
        ValueError: no episodes, or more successes than episodes.
    """
    if episodes <= 0 or not 0 <= successes <= episodes:
        raise ValueError(f"{successes} successes of {episodes} episodes")
    rate = successes / episodes
    scale = 1.0 + z * z / episodes
    centre = (rate + z * z / (2 * episodes)) / scale
    half = z * math.sqrt(rate * (1.0 - rate) / episodes + z * z / (4 * episodes**2)) / scale
    # At 0 and at `episodes` one limit is exact; rounding must not move it.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == episodes else centre + half
    return low, high
