"""The takeover schedule: shares that follow the evidence."""

import pytest

from trimtab.adapters import UserError
from trimtab.rl.takeover import Takeover, TakeoverConfig


def gate(base=(), steered=(), **settings):
    made = Takeover(TakeoverConfig(enabled=True, **settings), seed=0)
    for success in base:
        made.add(False, success)
    for success in steered:
        made.add(True, success)
    made()
    return made


def test_share_is_the_probability_of_being_as_good():
    """P(Beta(1 + s, 1 + f + doubt) >= Beta(1 + s', 1 + f')), by integration on a grid."""
    from scipy import integrate, stats

    made = gate([True] * 20 + [False] * 20, [True] * 6 + [False] * 4, doubt=2.0)
    steered, base = stats.beta(7, 7), stats.beta(21, 21)
    expected, _ = integrate.quad(lambda x: steered.pdf(x) * base.cdf(x), 0, 1)
    assert made.share == pytest.approx(expected, abs=0.04)


def test_learner_that_fails_stays_at_the_least_share():
    made = gate([True, False] * 20, [False] * 10, least=0.1)
    assert made.share == pytest.approx(0.1)
    assert 0.03 < sum(made() for _ in range(400)) / 400 < 0.2


def test_learner_that_succeeds_takes_over():
    assert gate([True, False] * 20, [True] * 15).share > 0.97


def test_old_failures_are_forgotten():
    assert gate([True, False] * 20, [False] * 30 + [True] * 20, window=20).share > 0.97


def test_looking_at_the_share_changes_nothing():
    watched, other = gate([True] * 5, [True] * 3), gate([True] * 5, [True] * 3)
    found = [(watched.share, watched()) for _ in range(50)]
    assert [(acts, True) for _, acts in found] == [(other(), True) for _ in range(50)]
    again = Takeover(TakeoverConfig(enabled=True), 1)
    again.load_state_dict(watched.state_dict())
    assert again.share == watched.share and [again() for _ in range(50)] == [other() for _ in range(50)]


def test_without_the_gate_the_learner_acts():
    made = Takeover(TakeoverConfig(enabled=False), 0)
    assert made() and made.share == 1.0


@pytest.mark.parametrize("settings", [{"least": 0.0}, {"least": 1.5}, {"window": 0}, {"doubt": -1.0}])
def test_bad_settings(settings):
    with pytest.raises(UserError, match=f"--train.gate.{next(iter(settings))}"):
        TakeoverConfig(**settings)
