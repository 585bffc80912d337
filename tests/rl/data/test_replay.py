"""The replay buffer."""

import numpy as np
import pytest
import torch

from trimtab.rl.data.replay import Layout, ReplayBuffer, storage_device
from trimtab.rl.data.returns import Transition


def transition(value, **changes):
    fields = {
        "features": np.full(3, value), "u": np.full(2, value), "reward": value, "discount": 0.5,
        "next_features": np.full(3, value + 1),
    }  # fmt: skip
    return Transition(**(fields | changes))


def test_oldest_makes_room():
    replay = ReplayBuffer(4, Layout(3, 2), seed=0)
    for value in range(6):
        replay.add(transition(float(value)))
    assert len(replay) == 4
    assert sorted(replay.sample(500)["reward"].unique().tolist()) == [2.0, 3.0, 4.0, 5.0]


def test_rows_stay_together_and_sampling_repeats():
    first, second = ReplayBuffer(10, Layout(3, 2), seed=1), ReplayBuffer(10, Layout(3, 2), seed=1)
    for value in range(5):
        first.add(transition(float(value)))
        second.add(transition(float(value)))
    batch = first.sample(64)
    assert (batch["features"][:, 0] == batch["reward"]).all()
    assert (batch["next_features"][:, 2] == batch["reward"] + 1).all()
    assert (batch["reward"] == second.sample(64)["reward"]).all()


def test_what_was_returned_is_that_of_one_value_for_all_states():
    """An episode of three chunks that ends with 1: V = (0 + 0 + 1 + 0.5 V + 0.5 V) / 3 = 1 / 2."""
    replay = ReplayBuffer(10, Layout(3, 2), seed=0)
    for reward, discount in ((0.0, 0.5), (0.0, 0.5), (1.0, 0.0)):
        replay.add(transition(0.0, reward=reward, discount=discount))
    reward, ended = replay.returned()
    assert reward / ended == 0.5


@pytest.mark.parametrize("name", ["features", "u", "reward", "next_features"])
def test_nan_is_kept_out(name):
    replay = ReplayBuffer(4, Layout(3, 2), seed=0)
    poison = float("nan") if name == "reward" else np.array([0.0, np.inf, 0.0][: 2 if name == "u" else 3])
    with pytest.raises(ValueError, match=f"'{name}'"):
        replay.add(transition(1.0, **{name: poison}))
    assert len(replay) == 0


def test_transitions_lie_on_a_gpu_with_four_times_their_room(monkeypatch):
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4_000, 80_000))
    assert storage_device(gpu, 1_000) == gpu and storage_device(gpu, 1_001) == storage_device(cpu, 1) == cpu


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_replay_on_a_gpu_is_that_on_the_host():
    """The same draws, and the same rows to keep; what is kept comes back as it was."""
    ours, host, again = (
        ReplayBuffer(10, Layout(3, 2), seed=1, device=device) for device in ("cuda", "cpu", "cuda")
    )
    for value in range(13):
        for replay in (ours, host):
            replay.add(transition(float(value)))
    kept = ours.rows(3, 13)
    again.put(3, kept)
    again.load_state_dict(ours.state_dict())
    for name, value in host.rows(3, 13).items():
        assert kept[name].device.type == "cpu" and torch.equal(kept[name], value)
    assert torch.equal(ours.all_features(), host.all_features())
    wanted, found, third = host.sample(50), ours.sample(50), again.sample(50)
    for name, value in wanted.items():
        assert found[name].is_cuda and torch.equal(found[name].cpu(), value), name
        assert torch.equal(third[name], found[name]), name
