"""Intervals of success rates, and tests between them. Impossible counts raise a ``ValueError``."""

import math
from collections.abc import Sequence

import numpy as np

Z95 = 1.959963984540054  # 95 % of a normal distribution lie within so many deviations
RESAMPLES = 10_000
Outcomes = Sequence[bool] | np.ndarray


def wilson_interval(successes: int, episodes: int) -> tuple[float, float]:
    """95 % score interval of a success rate (Wilson 1927)."""
    _check(successes, episodes)
    rate, z2 = successes / episodes, Z95**2 / episodes
    half = Z95 * math.sqrt((rate * (1 - rate) + z2 / 4) / episodes)
    low, high = ((rate + z2 / 2 + side) / (1 + z2) for side in (-half, half))
    return max(0.0, min(low, rate)), min(1.0, max(high, rate))  # of none or all, to the bit


def paired_difference(first: Outcomes, second: Outcomes) -> tuple[float, float, float]:
    """Difference of two success rates on the same episodes, second minus first, with its interval.

    The adjusted 95 % Wald interval for paired proportions of Bonett and Price (2012).

    Returns:
        (difference, low, high)
    """
    n, (gained, lost) = len(first), _discordant(first, second)
    up, down = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    half = Z95 * math.sqrt(max(up + down - (up - down) ** 2, 0.0) / (n + 2))
    return (gained - lost) / n, max(-1.0, up - down - half), min(1.0, up - down + half)


def mcnemar(first: Outcomes, second: Outcomes) -> float:
    """Two-sided p-value of McNemar's exact test: do two policies succeed equally often on the same episodes?

    Only the episodes count where one succeeds and the other does not; were the policies equally good, each
    would go either way with probability a half (McNemar 1947, with the binomial in place of chi-squared).
    """
    from scipy.stats import binomtest  # half a second of every command's start

    gained, lost = _discordant(first, second)
    n = gained + lost
    return float(binomtest(gained, n).pvalue) if n else 1.0


def p_below(successes: int, episodes: int, base_successes: int, base_episodes: int) -> float:
    """One-sided p-value of Fisher's exact test: at or under 0.05, the first rate lies below the second.

    The probability of so few successes among the first ``episodes``, had all successes fallen at random on
    all episodes.
    """
    from scipy.stats import fisher_exact

    _check(successes, episodes)
    _check(base_successes, base_episodes)
    counts = [[successes, episodes - successes], [base_successes, base_episodes - base_successes]]
    return float(fisher_exact(counts, "less").pvalue)


def bootstrap_interval(values: Sequence[float] | np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean of ``values`` (N,) (Efron 1979).

    ``seed`` is that of the draws, so that the same values have the same interval.
    """
    held = np.asarray(values, dtype=np.float64)
    if not len(held):
        raise ValueError("no values")
    draws = np.random.default_rng(seed).integers(len(held), size=(RESAMPLES, len(held)))
    low, high = np.quantile(held[draws].mean(1), [0.025, 0.975])
    return float(low), float(high)


def _check(successes: int, episodes: int) -> None:
    if episodes <= 0 or not 0 <= successes <= episodes:
        raise ValueError(f"{successes} successes of {episodes} episodes")


def _discordant(first: Outcomes, second: Outcomes) -> tuple[int, int]:
    """Of the same episodes, how many only ``second`` won, and how many only ``first``."""
    if len(first) != len(second) or not len(first):
        raise ValueError(f"{len(first)} and {len(second)} episodes cannot be paired")
    pairs = list(zip(first, second, strict=True))
    return sum(bool(b) and not a for a, b in pairs), sum(bool(a) and not b for a, b in pairs)
