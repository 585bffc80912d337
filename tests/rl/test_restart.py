"""At its end a run learns once more, from the beginning, on all that it has seen."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from tests.helpers.point import PointAdapter, PointConfig
from trimtab.adapters import UserError
from trimtab.policies.actor import ActorConfig
from trimtab.policies.critic import CriticConfig
from trimtab.policies.noise_space import FullNoiseConfig
from trimtab.rl.algorithms import BestOfNConfig
from trimtab.rl.budget import TrainConfig
from trimtab.rl.envs.vector import ChunkVectorEnv
from trimtab.rl.learner import learn_anew, make_algorithm
from trimtab.rl.runner import PolicyRunner
from trimtab.rl.runs.checkpoint import CheckpointConfig, Checkpoints
from trimtab.rl.runs.faults import Stopped
from trimtab.rl.runs.processes import ProcessGroup
from trimtab.rl.trainer import Trainer

SIZE = {
    "batch_size": 16,
    "num_candidates": 4,
    "actor": ActorConfig(hidden=16, layers=1),
    "critic": CriticConfig(hidden=16, layers=1, members=3, dropout=0.1),
}


def made(restart, checkpoints=None, steps=400):
    accelerator = Accelerator(cpu=True)
    kept = checkpoints and Checkpoints(checkpoints, CheckpointConfig(100), {}, ProcessGroup(accelerator))
    return Trainer(
        PolicyRunner(PointAdapter(), PointConfig()),
        ChunkVectorEnv(PointConfig(), 3, 0),
        accelerator,
        TrainConfig(env_steps=steps, first_update=20, updates_per_transition=0.5, restart=restart),
        BestOfNConfig(**SIZE),
        FullNoiseConfig(),
        progress=False,
        checkpoints=kept or None,
    )


def test_it_is_a_learner_of_its_own_on_the_whole_replay():
    """By hand: the learner that would have begun now, with the draws that come next."""
    again = made(0.8)
    learnt = again.run()
    plain = made(0.0)
    before = plain.run()
    assert (
        again.updates == plain.updates + round(0.8 * plain.updates)
        and again.replay.added == plain.replay.added
    )
    fresh, count = make_algorithm(plain, plain.collector, plain.space), round(0.8 * plain.updates)
    fresh.fit_normalizer(plain.replay.all_features())
    rates = []
    for number in range(count):
        if number % 20 == 0:
            fresh.progress(number / count)
            rates.append(fresh.critic_optimizer.param_groups[0]["lr"])
        fresh.update(plain.replay.sample(16))
    assert len(rates) > 2 and rates[0] == 1e-3 and rates[-1] < 0.5e-3, "its rate falls anew"
    for name, value in learnt.state_dict().items():
        assert torch.equal(value, fresh.state_dict()[name]), name
    assert not torch.equal(learnt.critic.net.weights[0], before.critic.net.weights[0])
    assert learnt is again.algorithm and learnt.updates == count


def test_updates_left_out_meanwhile_count_as_faults():
    trainer = made(1.0)
    trainer.run()
    trainer.rl = replace(trainer.rl, learning_rate=1e30, learning_rate_end=1.0)
    assert trainer.faults.total() == 0
    with pytest.raises(UserError, match=r"--rl.learning_rate: NaN or Inf in a gradient; .*--faults.limit=50"):
        learn_anew(trainer)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_demonstrations_take_the_part_that_they_had_then(share):
    """Their schedule begins anew, as that of the learning rate does."""
    asked = SimpleNamespace(mix=lambda replay, size, share: asked.__dict__.setdefault("share", share))
    trainer = made(0.0)
    trainer.demonstrations = asked
    trainer.batch(share)
    assert asked.share == share
    del asked.share
    trainer.env_steps = 100
    trainer.batch()
    assert asked.share == 0.25


def test_demonstrations_alone_are_learnt_once():
    trainer = made(1.0)
    trainer.updates, trainer.env_steps = 50, 0
    assert learn_anew(trainer) is trainer.algorithm and trainer.updates == 50


def test_a_signal_meanwhile_leaves_the_run_as_it_was_before_and_it_goes_on(tmp_path):
    whole = made(1.0, tmp_path / "whole").run()
    stopped = made(1.0, tmp_path / "stopped")
    batch, drawn = stopped.batch, []

    def noted(*share):
        drawn.append(share)
        if sum(map(bool, drawn)) > 70:  # it learns anew
            stopped.stop.name = "SIGTERM"
        return batch(*share)

    stopped.batch = noted
    with pytest.raises(Stopped) as said:
        stopped.run()
    assert said.value.name == "SIGTERM" and said.value.env_steps == stopped.env_steps >= 400
    resumed = made(1.0, tmp_path / "stopped")
    found, _ = resumed.checkpoints.newest()
    assert resumed.resume(found) == [] and resumed.env_steps == stopped.env_steps
    learnt = resumed.run()
    for name, value in whole.state_dict().items():
        assert torch.equal(value, learnt.state_dict()[name]), name
