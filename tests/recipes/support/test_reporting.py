"""What a run says of its own success."""

import numpy as np
import pytest

from trimtab.recipes.support.reporting import doubt, waits
from trimtab.rl.evaluation import Evaluation


def counted(successes, episodes=100):
    won = np.arange(episodes) < successes
    return Evaluation([*range(episodes)], won, np.full(episodes, 50)).summary()


@pytest.mark.parametrize("steered, better", [(70, True), (62, True), (61, False), (50, False), (20, False)])
def test_who_is_not_shown_to_be_better_is_named(steered, better):
    # Against 49 of 100, 62 have p = 0.044 and 61 have 0.059.
    said = doubt({"base": counted(49), "steered": counted(steered)})
    assert bool(said) != better
    assert better or said.startswith("steered is NOT shown to be better than the base (p = ")


def test_without_success_the_intervals_of_the_returns_tell():
    def entry(low, high, episodes=20):
        return {"success_rate": None, "episodes": episodes, "return_ci95": [low, high]}

    assert doubt({"base": entry(1.0, 2.0), "steered": entry(2.1, 3.0)}) == ""
    assert "their 95 % intervals meet" in doubt({"base": entry(1.0, 2.0), "steered": entry(1.9, 3.0)})
    assert "(one episode has no interval)" in doubt({"base": entry(1.0, 1.0, 1), "steered": entry(2.0, 2.0)})


def test_a_base_alone_is_not_compared():
    assert doubt({"base": counted(49)}) == ""


@pytest.mark.parametrize(
    "share, workers, said",
    [
        (0.6, 1, "rendering bounds this run: --machine.workers=8 spreads it over more cores (now 1)"),
        (0.6, 0, "rendering bounds this run: --machine.workers=8 spreads it over more cores (now 0)"),
        (
            0.6,
            9,
            "rendering bounds this run, in 8 processes, as many as --num_envs and the cores allow",
        ),
        (0.4, 1, None),
    ],
)
def test_what_bounds_a_run_is_said_with_its_option(share, workers, said):
    last = {"seconds_total": 90.0, "seconds_share/learner_waits": share, "seconds_share/denoise": 0.1}
    first, *rest = waits(last, "rendering", workers, 8)
    assert first == (
        f"of 90 s of training: the learner waited for the environments {share:.0%}, "
        "both waited for the base 10%"
    )
    assert rest == ([said] if said else [])
    assert waits(last, "", workers, 8) == [first]  # a robot
    assert waits({"seconds_total": 90.0}, "simulation", 1, 8) == []
