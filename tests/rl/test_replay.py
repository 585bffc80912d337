"""The replay buffer."""

import numpy as np
import pytest

from trimtab.rl.replay import ReplayBuffer
from trimtab.rl.returns import Transition


def transition(value, **changes):
    fields = {
        "features": np.full(3, value), "u": np.full(2, value), "reward": value, "discount": 0.5,
        "next_features": np.full(3, value + 1),
    }  # fmt: skip
    return Transition(**(fields | changes))


def test_oldest_makes_room():
    replay = ReplayBuffer(4, 3, 2, seed=0)
    for value in range(6):
        replay.add(transition(float(value)))
    assert len(replay) == 4
    assert sorted(replay.sample(500)["reward"].unique().tolist()) == [2.0, 3.0, 4.0, 5.0]


def test_rows_stay_together_and_sampling_repeats():
    first, second = ReplayBuffer(10, 3, 2, seed=1), ReplayBuffer(10, 3, 2, seed=1)
    for value in range(5):
        first.add(transition(float(value)))
        second.add(transition(float(value)))
    batch = first.sample(64)
    assert (batch["features"][:, 0] == batch["reward"]).all()
    assert (batch["next_features"][:, 2] == batch["reward"] + 1).all()
    assert (batch["reward"] == second.sample(64)["reward"]).all()


@pytest.mark.parametrize("name", ["features", "u", "reward", "next_features"])
def test_nan_is_kept_out(name):
    replay = ReplayBuffer(4, 3, 2, seed=0)
    poison = float("nan") if name == "reward" else np.array([0.0, np.inf, 0.0][: 2 if name == "u" else 3])
    with pytest.raises(ValueError, match=f"'{name}'"):
        replay.add(transition(1.0, **{name: poison}))
    assert len(replay) == 0
