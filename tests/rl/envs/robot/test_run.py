"""A run on the embedded arm by the command: what it leaves, and how it goes on."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from safetensors.torch import load_file

from tests.helpers.robots import START, command, make_policy
from tests.helpers.tiny import make_tiny
from trimtab.adapters import Conditioning, PolicyConfig, load_adapter
from trimtab.recipes.cli import main
from trimtab.recipes.embedded_arm import MujocoArm, MujocoArmConfig, ScriptedPusherConfig
from trimtab.recipes.embedded_arm.teleop import ScriptedPusher
from trimtab.recipes.support.robot_dataset import DatasetKeeper
from trimtab.rl.algorithms import BestOfNConfig
from trimtab.rl.envs.robot.episodes import RECORD, EpisodeRecord, episode_folders
from trimtab.rl.envs.robot.vector import RobotVectorEnv
from trimtab.rl.trainer import Trainer

# Episodes 1 and 4 succeed, 2 is dropped (and so followed by one more), the others run out of time.
SCRIPT = {"1": {"7": "success"}, "2": {"8": "drop"}, "4": {"11": "success"}}
OPTIONS = [
    "--rl.type=best_of_n",
    "--rl.num_candidates=4",
    "--rl.target_candidates=4",
    "--rl.batch_size=16",
    "--rl.n_step=1",
    "--rl.actor.hidden=16",
    "--rl.critic.hidden=16",
    "--train.first_update=4",
    "--train.updates_per_transition=2",
    "--robot.base_episodes=2",
    "--robot.episode_time_s=1",
    "--machine.threads=1",
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_policy(tmp_path_factory.mktemp("robot") / "base")


def adapt(base, output, *options, said=None, **robot):
    given = [f"--policy.path={base}", *OPTIONS] if "--resume=true" not in options else []
    command("adapt", *given, f"--output_dir={output}", *options, said=said or {"script": SCRIPT}, **robot)


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    """Six episodes that count."""
    output = tmp_path_factory.mktemp("robot") / "run"
    adapt(base, output, "--robot.episodes=6", "--checkpoint.keep=9")
    return output


def weights(output):
    return load_file(output / "artefact" / "model.safetensors")


def test_episodes_are_files(run):
    records = [EpisodeRecord.read(folder) for folder in sorted((run / "episodes").iterdir())]
    assert [record.outcome for record in records] == [
        *("timeout", "success", "abort", "timeout", "success", "timeout", "timeout")
    ]
    assert [record.steps for record in records] == [15, 7, 8, 15, 11, 15, 15]
    chunks = records[1].chunks
    assert [len(chunk.executed) for chunk in chunks] == [5, 2]
    assert chunks[0].note["u"].shape == (40,) and len(chunks[1].seen) == 3
    assert json.loads((run / "episodes" / "000002" / RECORD).read_text())["why"] == "drop"


def test_results_tell_base_from_steered(run):
    policies = json.loads((run / "results.json").read_text())["policies"]
    assert policies["base"]["episodes"] + policies["steered"]["episodes"] == 6
    assert policies["base"]["episodes"] >= 2
    assert sum(entry["successes"] for entry in policies.values()) == 2


def test_nothing_is_learnt_from_an_episode_that_was_dropped(run):
    records = [EpisodeRecord.read(folder) for folder in sorted((run / "episodes").iterdir())]
    counted = [len(record.chunks) for record in records if record.outcome != "abort"]
    assert len(counted) == 6 and len(replayed(run, "reward")) == sum(counted)


def same(one, other):
    return all((one[name] == other[name]).all() for name in one)


def test_a_run_that_was_stopped_between_episodes_goes_on_as_if_it_had_not(base, run, tmp_path):
    said = {"script": {**SCRIPT, "4": {"-1": "stop"}}, "delay_s": 0.1}
    adapt(base, tmp_path / "run", "--robot.episodes=6", said=said)
    assert not (tmp_path / "run" / "artefact").exists()
    adapt(base, tmp_path / "run", "--resume=true")
    assert same(weights(run), weights(tmp_path / "run"))


def test_the_dataset_is_whole_after_each_episode(monkeypatch, base, tmp_path):
    held, written = [], DatasetKeeper.written

    def read(keeper, clock):
        written(keeper, clock)
        held.append(recorded(tmp_path / "run"))

    monkeypatch.setattr(DatasetKeeper, "written", read)
    adapt(base, tmp_path / "run", "--robot.episodes=3")
    assert held == [1, 2, 2, 3]  # one was dropped


def recorded(output):
    """Episodes of the run's dataset, as LeRobot reads it."""
    return LeRobotDataset("a/run", root=output / "dataset").num_episodes


def test_the_episode_in_which_a_run_is_stopped_is_dropped(base, tmp_path, capsys):
    adapt(base, tmp_path / "run", "--robot.episodes=3", said={"script": {"1": {"6": "stop"}}})
    assert "stopped by the person" in capsys.readouterr().out
    assert recorded(tmp_path / "run") == 1
    adapt(base, tmp_path / "run", "--resume=true")
    records = [EpisodeRecord.read(folder) for folder in sorted((tmp_path / "run" / "episodes").iterdir())]
    assert [record.outcome for record in records] == ["timeout", "abort", "abort", "timeout", "success"]
    assert recorded(tmp_path / "run") == 3


def keep_checkpoints(output, count):
    """As if the run had been killed after its ``count``-th."""
    shutil.rmtree(output / "artefact")
    for folder in sorted(p for p in (output / "checkpoints").iterdir() if not p.is_symlink())[count:]:
        shutil.rmtree(folder)
    (output / "checkpoints" / "last").unlink(missing_ok=True)


@pytest.mark.parametrize("other", ["--robot.fps=10", "--robot.base_episodes=5", "--robot.dry_run=true"])
def test_a_run_does_not_go_on_as_another_one(run, capsys, other):
    assert main(["adapt", "--resume=true", f"--output_dir={run}", other]) == 2
    assert f"{other.partition('=')[0]}: {run}" in capsys.readouterr().err


def test_episodes_after_the_checkpoint_are_learnt_from_their_files(base, run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "episodes" / "000006")
    keep_checkpoints(tmp_path / "run", 2)
    adapt(base, tmp_path / "run", "--resume=true")
    assert len(list((tmp_path / "run" / "episodes").iterdir())) == 7
    assert same(weights(run), weights(tmp_path / "run"))


def test_a_robot_that_fails_before_an_episode_costs_that_one(base, tmp_path, capsys):
    arm = MujocoArmConfig(id="test", clock="step", fail_after=3 + 15 + 2)  # on its way to the second
    how = {"robot": arm, "reset": "pose", "start_pose": START, "said": {"delay_s": 0.0}}
    adapt(base, tmp_path / "run", "--robot.episodes=3", "--checkpoint.keep=9", **how)
    assert "the robot holds: Failed to write" in capsys.readouterr().out
    records = [EpisodeRecord.read(folder) for folder in sorted((tmp_path / "run" / "episodes").iterdir())]
    found = [(record.outcome, record.steps) for record in records]
    assert found == [("timeout", 15), ("abort", 0), ("timeout", 15), ("timeout", 15)]
    learnt = weights(tmp_path / "run")
    keep_checkpoints(tmp_path / "run", 1)
    adapt(base, tmp_path / "run", "--resume=true", **how)
    assert same(learnt, weights(tmp_path / "run"))


def replayed(output, name):
    """What the newest checkpoint's replay holds under ``name``."""
    folder = max((p for p in (output / "checkpoints").iterdir() if p.name.isdigit()), key=lambda p: p.name)
    return load_file(folder / "process-0.safetensors")[f".rows.{name}"]


def normalised(actions):
    """As the policy makes them: its range is 5 degrees about the start pose."""
    return (np.asarray(actions) - np.array([*START.values()])) / 5.0


def test_the_critic_is_told_what_the_robot_was_sent(base, tmp_path):
    arm = MujocoArmConfig(id="test", clock="step", max_relative_target=0.5)
    adapt(base, tmp_path / "run", "--robot.episodes=2", robot=arm)
    records = [EpisodeRecord.read(folder) for folder in sorted((tmp_path / "run" / "episodes").iterdir())]
    chunks = [chunk for record in records for chunk in record.chunks]
    assert any(np.abs(chunk.asked - chunk.executed).max() > 1 for chunk in chunks)
    rows = replayed(tmp_path / "run", "chunk").float().numpy()
    assert len(rows) == len(chunks)
    for row, chunk in zip(rows, chunks, strict=True):
        sent = normalised(chunk.executed)
        assert row.reshape(5, 5)[: len(sent)] == pytest.approx(sent, abs=0.01)


def test_what_a_person_does_is_learnt_by_the_critic_and_no_return_crosses_it(base, tmp_path):
    said = {"script": {"0": {"3": "takeover", "11": "release"}, "1": {"2": "takeover", "7": "success"}}}
    teleop = ScriptedPusherConfig(arm="test")
    adapt(base, tmp_path / "run", "--robot.episodes=2", "--rl.n_step=3", said=said, teleop=teleop)
    record = EpisodeRecord.read(tmp_path / "run" / "episodes" / "000000")
    parts = [(bool(chunk.human.any()), len(chunk.executed)) for chunk in record.chunks]
    assert parts == [(False, 3), (True, 5), (True, 3), (False, 4)]
    newest = max((tmp_path / "run" / "checkpoints").glob("*/process-0.json"))
    state = json.loads(newest.read_text())
    assert [(one["helped"], one["success"]) for one in state["recent"]] == [(True, False), (True, True)]
    assert state["takeover"]["base"] == [False, False], "whoever helped has won, not the policy"
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["policies"]["base"]["successes"] == 0
    discounts = replayed(tmp_path / "run", "discount").numpy()[:4]
    steps = np.log(discounts) / np.log(BestOfNConfig().gamma)
    # The first chunk alone; the person's two together, then the second of them; the last one alone.
    assert steps == pytest.approx([3, 8, 3, 4], abs=0.05)
    assert (replayed(tmp_path / "run", "chunk").float().numpy()[1].reshape(5, 5)[0]) == pytest.approx(
        normalised(record.chunks[1].executed[0]), abs=0.02
    )


def test_what_the_base_could_have_done_itself_is_imitated(monkeypatch, tmp_path):
    """The person's chunks get the noise that makes them; a run that reads them from its files, the same."""
    base = make_policy(tmp_path / "base", prediction_type="epsilon", clip_sample=False)
    hand = START | {"shoulder_pan.pos": START["shoulder_pan.pos"] + 2.0}
    monkeypatch.setattr(ScriptedPusher, "get_action", lambda self: hand)
    said, teleop = {"script": {"0": {"3": "takeover", "11": "release"}}}, ScriptedPusherConfig(arm="test")
    options = "--robot.episodes=2", "--rl.imitation_weight=0.1", "--checkpoint.keep=9"
    run = tmp_path / "run"
    adapt(base, run, *options, said=said, teleop=teleop)
    learnt, marks, u = weights(run), replayed(run, "imitated"), replayed(run, "u")
    assert marks.flatten().tolist() == [0, 1, 1, 0, 0, 0, 0]
    adapter = load_adapter(PolicyConfig(path=str(base), device="cpu"))
    features, chunks = (
        replayed(run, "features")[1:3],
        replayed(run, "chunk")[1:3].float().unflatten(1, (5, 5)),
    )
    person = torch.tensor(normalised([*hand.values()]), dtype=torch.float32)
    assert (chunks - person).abs().max() < 0.02
    made = Conditioning({"features": features}), u[1:3].unflatten(1, (8, 5)).float()
    assert adapter.misses(*made, chunks).max() < 0.1
    assert (adapter.denoise(*made) - person).square().mean().sqrt() < 0.2
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert (last["human_chunks"], last["human_chunks_inverted"]) == (2, 2)
    assert last["updates"] > 5

    shutil.rmtree(run / "artefact")
    checkpoints = sorted(p for p in (run / "checkpoints").iterdir() if not p.is_symlink())
    for folder in checkpoints[1:]:
        shutil.rmtree(folder)
    (run / "checkpoints" / "last").unlink(missing_ok=True)
    adapt(base, run, "--resume=true")
    assert same(learnt, weights(run)) and (replayed(run, "u") == u).all()


def test_a_policy_that_tells_no_noise_is_refused_before_anything_is_written(tmp_path, capsys):
    base = make_tiny("act", tmp_path / "base").path
    options = "--env.type=robot", "--robot.type=mujoco_arm", "--rl.imitation_weight=0.1"
    assert main(["adapt", f"--policy.path={base}", *options, f"--output_dir={tmp_path / 'run'}"]) == 2
    assert "--rl.imitation_weight: this policy's chunks" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_arm_does_not_wait_for_the_learner(monkeypatch, base, tmp_path):
    beside, paid = [], []

    class Hasty(RobotVectorEnv):
        def calls(self, seconds):
            beside.append(self._deadline is not None)
            return super().calls(1000.0)

    monkeypatch.setattr("trimtab.rl.envs.robot.vector.RobotVectorEnv", Hasty)
    update = Trainer._update
    monkeypatch.setattr(Trainer, "_update", lambda *args: (paid.append(update(*args)), paid[-1])[1])
    adapt(base, tmp_path / "run", "--robot.episodes=3", lockstep=False)
    assert any(beside)  # there was something to learn while the arm moved
    *during, last = [count for count in paid if count is not None]
    assert sum(during) <= 3  # the person was ready at once
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any(10 < line.get("actions_hz", 0) <= 15 for line in lines)  # of 15
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["updates"] == sum(during) + last and last > 5
    assert recorded(tmp_path / "run") == 3


def test_a_judging_that_is_stopped_keeps_its_episodes(monkeypatch, base, tmp_path):
    write = EpisodeRecord.write

    def stopped(record, root, facts):
        os.kill(os.getpid(), signal.SIGTERM) if record.number == 1 else None
        return write(record, root, facts)

    monkeypatch.setattr(EpisodeRecord, "write", stopped)
    command("eval", f"--policy.path={base}", "--eval.n_episodes=5", f"--output_dir={tmp_path / 'ev'}")
    results = json.loads((tmp_path / "ev" / "results.json").read_text())
    assert results["policies"]["base"]["episodes"] == len(episode_folders(tmp_path / "ev" / "episodes")) == 2


def test_a_judging_ends_where_the_robot_fails_again_and_again(monkeypatch, base, tmp_path, capsys):
    def broken(arm, action):
        raise ConnectionError("no status packet")

    monkeypatch.setattr(MujocoArm, "send_action", broken)
    command("eval", f"--policy.path={base}", f"--output_dir={tmp_path / 'ev'}", rc=2)
    assert "--robot.type: failed 5 times in a row" in capsys.readouterr().err
