"""A run that was stopped and resumed is the run that was not: same metrics, same weights, to the bit."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from tests.helpers.point import PointAdapter, PointConfig, PointEnv, point_dataset
from trimtab.adapters import UserError
from trimtab.policies.actor import ActorConfig
from trimtab.policies.critic import CriticConfig
from trimtab.policies.noise_space import FullNoiseConfig
from trimtab.policies.residual import EditConfig
from trimtab.rl.algorithms import BestOfNConfig, DSRLNAConfig, DSRLSACConfig, ResidualConfig
from trimtab.rl.budget import TrainConfig
from trimtab.rl.data.demonstration_data import DemosConfig
from trimtab.rl.envs.vector import ChunkVectorEnv
from trimtab.rl.runner import PolicyRunner
from trimtab.rl.runs.checkpoint import CheckpointConfig, Checkpoints, check, pack, unpack
from trimtab.rl.runs.faults import Stopped
from trimtab.rl.runs.processes import ProcessGroup
from trimtab.rl.takeover import TakeoverConfig
from trimtab.rl.trainer import Trainer

SIZE = {
    "batch_size": 16,
    "actor": ActorConfig(hidden=16, layers=1),
    "critic": CriticConfig(hidden=16, layers=1),
}
TRAIN = TrainConfig(
    env_steps=600,
    first_update=40,
    warmup_transitions=60,
    log_every=100,
    replay_capacity=120,
    updates_per_transition=0.4,
)
RUNS = {
    "dsrl_sac": (DSRLSACConfig(**SIZE), TRAIN),
    "dsrl_na": (DSRLNAConfig(num_candidates=4, **SIZE), TRAIN),
    "exact": (DSRLNAConfig(mode="exact", **SIZE), TRAIN),
    "best_of_n": (BestOfNConfig(num_candidates=4, target_candidates=2, acting="thompson", **SIZE), TRAIN),
    "proposals": (BestOfNConfig(num_candidates=4, target_candidates=2, actor_candidates=2, **SIZE), TRAIN),
    "restart": (BestOfNConfig(num_candidates=4, **SIZE), replace(TRAIN, restart=0.5)),
    "edits": (BestOfNConfig(num_candidates=4, edit=EditConfig(scale=0.3), **SIZE), TRAIN),
    "demonstrations": (DSRLNAConfig(num_candidates=4, **SIZE), TRAIN),
    "residual": (ResidualConfig(**SIZE), TRAIN),
    "gate": (DSRLSACConfig(**SIZE), replace(TRAIN, warmup_transitions=0, gate=TakeoverConfig(enabled=True))),
}


class StopAt:
    """Stands for a signal: wants the run to stop at an environment step."""

    name = "SIGTERM"

    def __init__(self, step=10**9):
        self.step, self.trainer = step, None

    def __call__(self):
        return self.trainer.env_steps + 20 >= self.step


def make(
    folder, rl, train, adapter=None, config=None, workers=0, stop_at=10**9, every=150, envs=3, demos=None
):
    """A trainer with its environments and the metrics that it will write."""
    config, lines, stop = config or PointConfig(), [], StopAt(stop_at)
    accelerator = Accelerator(cpu=True)
    vec = ChunkVectorEnv(config, envs, workers, tolerant=True)
    checkpoints = Checkpoints(folder, CheckpointConfig(every), {}, ProcessGroup(accelerator))
    checkpoints.beside = lambda: {"lines": len(lines)}
    trainer = Trainer(
        *(PolicyRunner(adapter or PointAdapter(), config), vec, accelerator, train, rl, FullNoiseConfig(), 3),
        on_metrics=lines.append,
        progress=False,
        checkpoints=checkpoints,
        stop=stop,
        demos=demos or DemosConfig(),
    )
    stop.trainer = trainer
    return trainer, lines


def go(trainer):
    """Run; whether to the end."""
    try:
        trainer.run()
    except Stopped:
        return False
    finally:
        trainer.vec.close()
    return True


def resume(folder, lines, *arguments, **named):
    """Go on from the newest checkpoint; returns the trainer, all lines of the run and the notes."""
    trainer, new = make(folder, *arguments, **named)
    found, notes = trainer.checkpoints.newest()
    notes += trainer.resume(found)
    held = lines[: found.beside["lines"]]
    trainer.checkpoints.beside = lambda: {"lines": len(held) + len(new)}
    go(trainer)
    return trainer, held + new, notes


def timeless(lines):
    return [{k: v for k, v in line.items() if not k.startswith("seconds")} for line in lines]


def weights(trainer):
    return {name: value.clone() for name, value in trainer.algorithm.state_dict().items()}


def check_same(first, second):
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert first.keys() == second.keys()


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_is_the_run_that_was_not_stopped(name, tmp_path):
    rl, train = RUNS[name]
    demos = DemosConfig()
    if name == "demonstrations":  # their share falls from line to line
        demos = DemosConfig(root=str(point_dataset(tmp_path / "demos")), schedule="linear")
    whole, expected = make(tmp_path / "whole", rl, train, demos=demos)
    assert go(whole)
    assert len({line.get("demo_share") for line in expected}) == (6 if demos.enabled else 1)
    lines = []
    for number, stop_at in enumerate((130, 330, 331, 470)):  # 331: at once after it was resumed
        if number == 0:
            trainer, lines = make(tmp_path / "cut", rl, train, stop_at=stop_at, demos=demos)
            assert not go(trainer)
        else:
            trainer, lines, notes = resume(tmp_path / "cut", lines, rl, train, stop_at=stop_at, demos=demos)
            assert not notes
    trainer, lines, notes = resume(tmp_path / "cut", lines, rl, train, demos=demos)
    assert not notes and trainer.updates > 80
    assert trainer.replay.added > trainer.replay.capacity, "the ring has wrapped"
    assert timeless(lines) == timeless(expected)
    check_same(weights(whole), weights(trainer))
    assert torch.equal(whole.replay.rows(0, 120)["u"], trainer.replay.rows(0, 120)["u"])


def test_workers_and_a_finished_run(tmp_path):
    rl, train = RUNS["dsrl_sac"]
    whole, expected = make(tmp_path / "whole", rl, train)
    go(whole)
    trainer, lines = make(tmp_path / "cut", rl, train, workers=2, stop_at=300)
    assert not go(trainer)
    trainer, lines, _ = resume(tmp_path / "cut", lines, rl, train, workers=2)
    assert timeless(lines) == timeless(expected)
    again, lines, _ = resume(tmp_path / "cut", lines, rl, train)
    assert timeless(lines) == timeless(expected), "nothing is left to do, and nothing is done"
    assert again.updates == trainer.updates


def test_a_longer_run_goes_on_where_the_shorter_one_ended(tmp_path):
    rl, train = RUNS["dsrl_sac"]
    whole, _ = make(tmp_path / "whole", rl, replace(train, env_steps=900))
    go(whole)
    short, lines = make(tmp_path / "cut", rl, train)
    go(short)
    trainer, lines, _ = resume(tmp_path / "cut", lines, rl, replace(train, env_steps=900))
    check_same(weights(whole), weights(trainer))


class Fickle(PointEnv):
    """Starts anywhere, whatever the seed."""

    def reset(self, *, seed=None, options=None):
        _, info = super().reset(seed=seed)
        self.x += np.random.default_rng().uniform(-0.01, 0.01)
        return self._observation(), info


class Shaky(PointEnv):
    """Starts as it did, and moves another way."""

    def step(self, action):
        self.x += 0.01
        return super().step(action)


@pytest.mark.parametrize("other", [Fickle, Shaky])
def test_an_episode_that_does_not_repeat_is_dropped_and_said(other, tmp_path, monkeypatch):
    rl, train = RUNS["dsrl_sac"]
    trainer, lines = make(tmp_path, rl, train, stop_at=300)
    go(trainer)
    monkeypatch.setattr("tests.helpers.point.PointEnv", other)
    trainer, lines, notes = resume(tmp_path, lines, rl, train)
    assert len(notes) == 1 and notes[0].startswith("3 running episodes did not repeat exactly")
    assert trainer.faults["unrepeatable"] == 3 and lines[-1]["faults"] == 3
    assert trainer.env_steps >= 600


@pytest.mark.parametrize("name", ["best_of_n", "gate"])
def test_an_environment_that_cannot_repeat_is_not_moved_to_come_back(name, tmp_path, monkeypatch):
    rl, train = RUNS[name]
    monkeypatch.setattr(PointEnv, "metadata", {"repeatable": False})
    moves = []
    for move in ("reset", "step"):
        plain = getattr(PointEnv, move)
        monkeypatch.setattr(
            PointEnv,
            move,
            lambda env, *arguments, plain=plain, move=move, **named: (
                moves.append(move) or plain(env, *arguments, **named)
            ),
        )
    trainer, _ = make(tmp_path, rl, train, stop_at=310)
    go(trainer)
    interrupted = sum(bool(trace.actions) for trace in trainer.collector.rollout.traces.values())
    assert interrupted
    moves.clear()
    again, _ = make(tmp_path, rl, train)
    notes = again.resume(again.checkpoints.newest()[0])
    assert moves == ["reset"] * 3, "no episode is begun twice, none is lived through again"
    (note,) = notes
    assert note.startswith(f"{interrupted} interrupted episode") and "cannot repeat them" in note
    assert again.dropped == interrupted and not again.faults.total()
    collector = again.collector
    rollout = collector.rollout
    assert rollout.upcoming == trainer.collector.rollout.upcoming
    assert not any(episode.features for episode in collector._episodes)
    assert not any(trace.actions for trace in rollout.traces.values())
    assert [len(trace.digests) for trace in rollout.traces.values()] == [1, 1, 1]
    assert not any(accumulator._pending for accumulator in collector._accumulators)
    if name == "best_of_n":  # candidates are drawn where the run's draws had come to
        for i, env in enumerate(again.checkpoints.newest()[0].read(0)["collector"]["envs"]):
            generator = torch.Generator()
            generator.set_state(env["rollout"]["generator"])
            again.runner.prior(rl.candidates, generator)
            assert torch.equal(generator.get_state(), rollout.generators[i].get_state())
    assert go(again) and again.env_steps >= 600


def damaged(folder, name, how):
    """Damage a file of a checkpoint."""
    path = folder / name
    content = path.read_bytes()
    path.unlink()
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "flipped":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def test_every_damage_is_found_and_the_checkpoint_before_is_used(tmp_path):
    rl, train = RUNS["dsrl_sac"]
    trainer, _ = make(tmp_path / "run", rl, train, every=200)
    go(trainer)
    old, new = sorted(p for p in (tmp_path / "run").iterdir() if p.name.isdigit())
    assert (tmp_path / "run" / "last").resolve() == new
    names = sorted(str(p.relative_to(new)) for p in new.rglob("*") if p.is_file())
    assert len(names) == 3 and all(name.endswith((".json", ".safetensors")) for name in names)
    checkpoints = trainer.checkpoints
    for how in ("truncated", "flipped", "missing"):
        for name in names:
            copy = tmp_path / f"{how}-{name.replace('/', '-')}"
            shutil.copytree(tmp_path / "run", copy, symlinks=True)
            damaged(copy / new.name, name, how)
            found, notes = replace(checkpoints, folder=copy).newest()
            assert found.folder.name == old.name, (how, name)
            assert len(notes) == 1 and "is not whole" in notes[0]
            shutil.rmtree(copy)
    damaged(new, "manifest.json", "missing")
    damaged(old, "process-0.json", "missing")
    assert checkpoints.newest()[0] is None


def test_after_falling_back_the_run_is_still_the_same(tmp_path):
    rl, train = RUNS["dsrl_na"]
    whole, expected = make(tmp_path / "whole", rl, train)
    go(whole)
    trainer, lines = make(tmp_path / "cut", rl, train, every=100, stop_at=450)
    go(trainer)
    newest = checkpoint_folders(tmp_path / "cut")[-1]
    damaged(newest, "process-0.safetensors", "truncated")
    trainer, lines, notes = resume(tmp_path / "cut", lines, rl, train)
    assert len(notes) == 1
    assert timeless(lines) == timeless(expected)
    for folder in checkpoint_folders(tmp_path / "cut"):
        check(folder)


def checkpoint_folders(folder):
    return sorted(place for place in folder.iterdir() if place.name.isdigit())


def test_trees_come_back_and_strange_values_do_not_go():
    tree = {
        "a": [1, 2.5, None, True, "x", {"b": torch.arange(3), "c": np.ones((2, 0))}],
        "big": 2**100,
        "half": torch.tensor(0.1, dtype=torch.float16),
        "third": 1 / 3,
    }
    tensors = {}
    back = unpack(json.loads(json.dumps(pack(tree, tensors))), tensors)
    assert back["a"][:5] == tree["a"][:5] and back["big"] == tree["big"] and back["third"] == tree["third"]
    assert torch.equal(back["a"][5]["b"], tree["a"][5]["b"]) and back["a"][5]["c"].shape == (2, 0)
    assert back["half"].dtype == torch.float16
    with pytest.raises(TypeError, match=r"\.x: a object has no place in a checkpoint"):
        pack({"x": object()}, {})


def test_a_checkpoint_of_another_make_is_refused(tmp_path):
    rl, train = RUNS["dsrl_sac"]
    trainer, _ = make(tmp_path, rl, train, stop_at=200)
    go(trainer)
    other, _ = make(tmp_path, replace(rl, critic=CriticConfig(hidden=32, layers=1)), train)
    with other.vec, pytest.raises(UserError, match=r"--resume: .* does not fit this run"):
        other.resume(trainer.checkpoints.newest()[0])


def test_a_checkpoint_of_an_older_format_is_refused_in_one_line(tmp_path):
    rl, train = RUNS["dsrl_sac"]
    trainer, _ = make(tmp_path, rl, train, stop_at=200)
    go(trainer)
    manifest = checkpoint_folders(tmp_path)[-1] / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 1}))
    with pytest.raises(UserError, match=r"--resume: .* another version \(format 1, this one reads 3\)"):
        trainer.checkpoints.newest()
    assert manifest.is_file()
