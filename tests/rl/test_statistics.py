"""Wilson intervals against published values."""

import pytest

from trimtab.rl.statistics import mcnemar, paired_difference, wilson_interval


@pytest.mark.parametrize(
    "successes, episodes, low, high",
    [
        (0, 10, 0.0, 0.2775),  # Newcombe 1998, table I, method 3, and R's prop.test(correct=FALSE)
        (10, 10, 0.7225, 1.0),
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson(successes, episodes, low, high):
    assert wilson_interval(successes, episodes) == (
        pytest.approx(low, abs=1e-4),
        pytest.approx(high, abs=1e-4),
    )


def test_impossible_counts():
    for counts in ((0, 0), (5, 4), (-1, 4)):
        with pytest.raises(ValueError):
            wilson_interval(*counts)


@pytest.mark.parametrize(
    "gained, lost, both, neither, difference, low, high",
    [
        # Bonett and Price (2012); the first two are the examples of Fagerland et al. (2014, 2017). By hand:
        # d = (g - l) / (n + 2), of a half-width 1.96 sqrt((g + l + 2) / (n + 2) - d^2) / sqrt(n + 2).
        (1, 7, 1, 12, -6 / 21, -0.5084, -0.0134),  # d = -6 / 23, half-width 0.24749
        (6, 16, 59, 80, -10 / 161, -0.1195, -0.0032),  # d = -10 / 163, half-width 0.05815
        (0, 0, 3, 2, 0.0, -0.3960, 0.3960),  # d = 0, half-width 1.96 sqrt(2) / 7 = 0.39597
        (4, 0, 0, 0, 1.0, 0.0703, 1.0),  # d = 4 / 6, half-width 0.59640, cut at 1
    ],
)
def test_paired_difference(gained, lost, both, neither, difference, low, high):
    first = [False] * gained + [True] * lost + [True] * both + [False] * neither
    second = [True] * gained + [False] * lost + [True] * both + [False] * neither
    found = paired_difference(first, second)
    assert found == (pytest.approx(difference), pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))
    with pytest.raises(ValueError, match="cannot be paired"):
        paired_difference(first, second[:-1])


@pytest.mark.parametrize("gained, lost, both", [(10, 2, 5), (2, 10, 0), (3, 3, 1), (0, 0, 4), (6, 0, 0)])
def test_mcnemar_is_the_binomial_test(gained, lost, both):
    from scipy.stats import binomtest

    first = [False] * gained + [True] * lost + [True] * both
    second = [True] * gained + [False] * lost + [True] * both
    expected = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert mcnemar(first, second) == pytest.approx(expected, abs=1e-12)
    with pytest.raises(ValueError, match="cannot be paired"):
        mcnemar(first, second[:-1])


def test_an_interval_holds_its_rate_to_the_bit():
    for episodes in range(1, 60):
        for successes in range(episodes + 1):
            low, high = wilson_interval(successes, episodes)
            assert 0.0 <= low <= successes / episodes <= high <= 1.0
