"""What goes wrong is dropped, counted, survived; and too much of it stops the run, with a checkpoint."""

import json
import os
import signal

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from tests.helpers.faulty import FaultyConfig, files_of_at_most
from tests.helpers.point import PointAdapter
from trimtab.adapters import UserError
from trimtab.policies.actor import ActorConfig
from trimtab.policies.critic import CriticConfig
from trimtab.policies.noise_space import FullNoiseConfig
from trimtab.rl.algorithms import DSRLSACConfig
from trimtab.rl.budget import TrainConfig
from trimtab.rl.data.memory import check_replay
from trimtab.rl.data.replay import Layout
from trimtab.rl.envs.vector import ChunkVectorEnv
from trimtab.rl.runner import PolicyRunner
from trimtab.rl.runs.checkpoint import CheckpointConfig, Checkpoints, check
from trimtab.rl.runs.faults import FaultsConfig, Stopped, StopSignals, leave_terminal, stopping
from trimtab.rl.runs.processes import ProcessGroup, StepGuard
from trimtab.rl.trainer import Trainer

RL = DSRLSACConfig(
    batch_size=16, actor=ActorConfig(hidden=16, layers=1), critic=CriticConfig(hidden=16, layers=1)
)
TRAIN = TrainConfig(
    env_steps=200, first_update=20, warmup_transitions=20, log_every=50, updates_per_transition=0.3
)


def make(folder, fault="none", workers=0, limit=50, every=60, adapter=None, stop=None, **train):
    config, lines = FaultyConfig(fault=fault), []
    accelerator = Accelerator(cpu=True)
    vec = ChunkVectorEnv(config, 3, workers, tolerant=True, timeout=2.0 if fault.endswith("hang") else 60.0)
    trainer = Trainer(
        *(PolicyRunner(adapter or PointAdapter(), config), vec, accelerator),
        *(TrainConfig(**{**vars(TRAIN), **train}), RL, FullNoiseConfig(), 1),
        on_metrics=lines.append,
        progress=False,
        checkpoints=Checkpoints(folder, CheckpointConfig(every), {}, ProcessGroup(accelerator)),
        faults_config=FaultsConfig(limit),
        stop=stop or StopSignals(),
    )
    return trainer, lines


def check_sound(trainer):
    rows = trainer.replay.rows(0, len(trainer.replay))
    assert all(torch.isfinite(value).all() for value in rows.values())
    assert all(torch.isfinite(value).all() for value in trainer.algorithm.state_dict().values())


@pytest.mark.parametrize(
    "fault, workers, kind",
    [
        ("raise", 0, "crash"),
        ("die", 1, "crash"),
        ("hang", 1, "hang"),
        ("observation", 0, "observation"),
        ("reward", 0, "reward"),
        ("reset raise", 0, "crash"),
        ("reset observation", 0, "observation"),
        ("reset die", 1, "crash"),
    ],
)
def test_episodes_are_dropped_and_counted_and_the_run_goes_on(fault, workers, kind, tmp_path):
    budget = 120 if fault == "hang" else 200  # each takes two seconds
    trainer, lines = make(tmp_path, fault, workers, env_steps=budget)
    seeds, on_step = [], trainer.on_step
    trainer.on_step = lambda episodes: (seeds.extend(e.seed for e in episodes), on_step(episodes))
    with trainer.vec:
        trainer.run()
    counts = {kind: count for kind, count in trainer.faults.items() if count}
    assert set(counts) == {kind} and counts[kind] >= 2
    assert lines[-1]["faults"] == counts[kind]
    # What cannot begin takes no episode with it, but where a worker dies.
    assert lines[-1]["episodes_dropped"] >= 2
    assert trainer.env_steps >= budget and trainer.updates > 5
    check_sound(trainer)
    if workers == 0:  # a worker takes the other environments' episodes with it
        assert seeds and all(seed % 4 != 3 or steps_of(trainer, seed) < 5 for seed in seeds)
        # What was told of a lost episode before its fault is gone but for whole transitions.
        assert lines[-1]["episodes"] == len(seeds)


def steps_of(trainer, seed):
    return next((episode.steps for episode in trainer.recent if episode.seed == seed), 0)


@pytest.mark.parametrize(
    "fault, message", [("always raise", "the physics exploded"), ("always reward", "inf")]
)
def test_too_many_faults_stop_the_run_with_a_checkpoint(fault, message, tmp_path):
    trainer, _ = make(tmp_path, fault, limit=10)
    with trainer.vec, pytest.raises(UserError, match=r"--env.type: .*more than --faults.limit=10") as caught:
        trainer.run()
    assert message in str(caught.value)
    assert 10 < trainer.faults.total() <= 13, "at most one more chunk of every environment"
    found, notes = trainer.checkpoints.newest()
    assert found.env_steps == trainer.env_steps and not notes
    counted = json.loads((found.folder / "process-0.json").read_text())["faults"]
    assert sum(counted.values()) == trainer.faults.total()


def test_nothing_that_goes_on_after_an_error_takes_a_signal_for_one():
    with pytest.raises(Stopped):
        try:
            raise Stopped("SIGTERM")
        except Exception:  # as simulators, servers and videos are guarded
            pass


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"first_update": 100}, "10 transitions, learning starts at 100 with .*lower --train.first_update"),
        ({}, "10 transitions, learning starts at 5 with 0.3 .*raise --train.updates_per_transition"),
    ],
)
def test_too_little_to_learn_from_names_the_cause(changed, line):
    train = TrainConfig(**{**vars(TRAIN), "first_update": 5, **changed})
    train.check_enough()
    with pytest.raises(UserError, match=line):
        train.check_learnt(0, 10, 0)
    with pytest.raises(UserError, match=r"--train.env_steps: 99 give no more transitions than that"):
        TrainConfig(env_steps=99, first_update=100).check_enough()
    TrainConfig(env_steps=99, first_update=100, episodes=50).check_enough()


def test_a_policy_that_makes_nan_chunks(tmp_path):
    adapter = PointAdapter()
    trainer, _ = make(tmp_path, adapter=adapter, limit=5)
    adapter.policy.gain.fill_(float("nan"))
    with (
        trainer.vec,
        pytest.raises(UserError, match=r"--policy.path: the policy produced a NaN or Inf action"),
    ):
        trainer.run()
    assert len(trainer.replay) == 0 and trainer.faults["chunk"] == 6


def test_a_run_that_faults_left_too_short_names_them(tmp_path):
    trainer, _ = make(tmp_path, "raise", env_steps=100, first_update=500)
    with trainer.vec, pytest.raises(UserError, match=r"--train.env_steps: 100 gave ") as raised:
        trainer.run()
    assert trainer.checkpoints.newest()[0].env_steps == trainer.env_steps, "what was collected is kept"
    assert trainer.dropped and f" without the {trainer.dropped} episodes lost to faults" in str(raised.value)


def test_nan_losses_never_reach_the_weights(tmp_path):
    """Every third batch is poisoned: those updates are left out, counted, and the metrics stay finite."""
    trainer, lines = make(tmp_path, limit=1000)
    sample, poisoned = trainer.replay.sample, []

    def poison(size):
        found = sample(size)
        if trainer.updates % 3 == 0:
            found["reward"] = torch.full_like(found["reward"], torch.nan)
            poisoned.append(trainer.updates)
        return found

    trainer.replay.sample = poison
    with trainer.vec:
        trainer.run()
    check_sound(trainer)
    assert trainer.faults["loss"] == len(poisoned) > 5
    assert all(np.isfinite(v) for line in lines for v in line.values() if isinstance(v, float))
    assert "critic_loss" in lines[-1]


def test_a_broken_step_changes_nothing():
    """Beside an optimiser without a guard, which gets the gradients clipped by hand, and no broken one."""

    def build():
        parameter = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        return parameter, torch.optim.Adam([parameter], lr=0.1, fused=True)

    (guarded, first), (plain, second) = build(), build()
    holder, guard = torch.nn.Module(), StepGuard(ProcessGroup(Accelerator(cpu=True)), clip=1.0)
    holder.optimizer = first
    guard.attach(holder)
    nan, inf = float("nan"), float("inf")
    steps = [([3.0, 4.0], [0.6, 0.8]), ([nan, 1.0], None), ([1.0, -inf], None), ([0.03, 0.0], [0.03, 0.0])]
    for gradient, clipped in steps:
        guarded.grad = torch.tensor(gradient)
        first.step()
        if clipped:
            plain.grad = torch.tensor(clipped)
            second.step()
        assert torch.allclose(guarded, plain, atol=1e-7)
        for name, value in second.state[plain].items():
            assert torch.allclose(first.state[guarded][name], value, atol=1e-7), name
    assert guard.skipped == 2 and second.state[plain]["step"] == 2


def test_a_full_disk_stops_the_run_and_leaves_the_last_checkpoint(tmp_path):
    trainer, _ = make(tmp_path, every=60)
    save, saved = trainer.checkpoints.save, []

    def fill_up(env_steps, state):
        with files_of_at_most(10_000 if saved else 10**9):
            saved.append(env_steps)
            save(env_steps, state)

    trainer.checkpoints.save = fill_up
    with trainer.vec, pytest.raises(UserError, match=r"--output_dir: cannot write a checkpoint .*too large"):
        trainer.run()
    (left,) = [place for place in tmp_path.iterdir() if not place.is_symlink()]
    assert int(left.name) == saved[0], "the one from before is there, and nothing half-written"
    check(left)


def test_an_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    trainer, _ = make(tmp_path / "file" / "checkpoints")
    with trainer.vec, pytest.raises(UserError, match=r"--output_dir: cannot write .*there is none yet"):
        trainer.run()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_heeded_at_the_next_whole_chunk(number, tmp_path):
    signals = StopSignals()
    trainer, _ = make(tmp_path, stop=signals)
    before = signal.getsignal(number)
    learn = trainer._learn

    def interrupted():
        if trainer.env_steps > 100 and not signals():
            os.kill(os.getpid(), number)
        learn()

    trainer._learn = interrupted
    with trainer.vec, signals.installed():
        signals.deferred = True
        with pytest.raises(Stopped) as caught:
            trainer.run()
    found, _ = trainer.checkpoints.newest()
    assert caught.value.name == signal.Signals(number).name
    assert found.env_steps == trainer.env_steps == caught.value.env_steps < 120
    assert signal.getsignal(number) == before


def test_a_replay_that_the_machine_cannot_hold():
    layout = Layout(10, 4, {"candidates": ((16, 32), torch.float16)})
    line = check_replay(1000, layout)
    assert line == f"replay: 1,000 transitions of {4 * 26 + 2 * 512:,} bytes, 1 MiB when full"
    with pytest.raises(UserError, match=r"--train.replay_capacity: .*lower it to [\d,]+ or less"):
        check_replay(10**12, layout)


def test_a_lost_terminal_stops_a_run_unless_nohup_was_asked_for():
    signals = StopSignals()
    with signals.installed():
        signals.deferred = True
        os.kill(os.getpid(), signal.SIGHUP)
        assert signals() and signals.name == "SIGHUP"
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert stopping() == [signal.SIGTERM, signal.SIGINT]
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_is_said_after_the_terminal_is_lost_does_no_harm():
    kept = [os.dup(output) for output in (1, 2)]
    theirs, ours = os.openpty()
    try:
        for output in (1, 2):
            os.dup2(ours, output)
        os.close(theirs)
        leave_terminal(signal.SIGTERM)
        with pytest.raises(OSError, match="Input/output error"):
            os.write(1, b"the terminal is there")
        leave_terminal(signal.SIGHUP)
        os.write(1, b"the terminal is gone")
        os.write(2, b"the terminal is gone")
    finally:
        for output, one in zip((1, 2), kept, strict=True):
            os.dup2(one, output)
            os.close(one)
        os.close(ours)
