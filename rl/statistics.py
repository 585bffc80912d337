"""Intervals of success rates, and tests between them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

RESAMPLES = 10_000


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


def paired_difference(
    first: Sequence[bool] | np.ndarray, second: Sequence[bool] | np.ndarray, z: float = 1.959963984540054
) -> tuple[float, float, float]:
    """Difference of two success rates on the same episodes, second minus first, with its interval.

    The adjusted Wald interval for paired proportions of Bonett and Price (2012), 95 % at the default ``z``.

    Returns:
        (difference, low, high)

    Raises:
        ValueError: no episodes, or not the same number.
    """
    if len(first) != len(second) or not len(first):
        raise ValueError(f"{len(first)} and {len(second)} episodes cannot be paired")
    n = len(first)
    gained = sum(bool(b) and not a for a, b in zip(first, second, strict=True))
    lost = sum(bool(a) and not b for a, b in zip(first, second, strict=True))
    up, down = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    half = z * math.sqrt(max(up + down - (up - down) ** 2, 0.0) / (n + 2))
    centre = up - down
    return (gained - lost) / n, max(-1.0, centre - half), min(1.0, centre + half)


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Two-sided p-value of McNemar's exact test: do two policies succeed equally often on the same episodes?

    Only the episodes count where one succeeds and the other does not; were the policies equally good, each
    would go either way with probability a half (McNemar 1947, with the binomial in place of chi-squared).

    Raises:
        ValueError: no episodes, or not the same number.
    """
    if len(first) != len(second) or not len(first):
        raise ValueError(f"{len(first)} and {len(second)} episodes cannot be paired")
    gained = sum(bool(b) and not a for a, b in zip(first, second, strict=True))
    lost = sum(bool(a) and not b for a, b in zip(first, second, strict=True))
    n, fewer = gained + lost, min(gained, lost)
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(fewer + 1)) / 2**n)


def p_below(successes: int, episodes: int, base_successes: int, base_episodes: int) -> float:
    """One-sided p-value of Fisher's exact test: at or under 0.05, the first rate lies below the second.

    The probability of so few successes among the first ``episodes``, had all successes fallen at random on
    all episodes.

    Raises:
        ValueError: no episodes, or more successes than episodes.
    """
    for won, of in ((successes, episodes), (base_successes, base_episodes)):
        if of <= 0 or not 0 <= won <= of:
            raise ValueError(f"{won} successes of {of} episodes")
    won, lost = successes + base_successes, episodes + base_episodes - successes - base_successes
    ways = sum(math.comb(won, k) * math.comb(lost, episodes - k) for k in range(successes + 1))
    return ways / math.comb(won + lost, episodes)


def bootstrap_interval(
    values: Sequence[float] | np.ndarray, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean (Efron 1979): values are drawn anew, with replacement.

    Args:
        values: (N,), one of each episode.
        level: of confidence.
        seed: of the draws, so that the same values have the same interval.

    Raises:
        ValueError: no values.
    """
    held = np.asarray(values, dtype=np.float64)
    if not len(held):
        raise ValueError("no values")
    draws = np.random.default_rng(seed).integers(len(held), size=(RESAMPLES, len(held)))
    low, high = np.quantile(held[draws].mean(1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
