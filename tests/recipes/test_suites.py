"""Bases for benchmarks' tasks: made by the command, whole, and what `eval` can put to work."""

import json

import numpy as np
import pytest
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from trimtab.recipes.cli import main
from trimtab.recipes.embedded_base import gym_mujoco


@pytest.fixture
def hopper(tmp_path, monkeypatch):
    """The command for a Hopper base, from agents that need not have learnt anything."""
    monkeypatch.setitem(gym_mujoco.LOCOMOTION, "Hopper-v5", (1.0, 125, "Hop"))
    monkeypatch.setattr(gym_mujoco, "EVERY", 200)
    monkeypatch.setattr(gym_mujoco, "EVALUATED", 2)
    argv = ["base", "--suite=gym_mujoco", "--episodes=3", "--cloning.steps=5", f"--output_dir={tmp_path}"]
    return [*argv, "--threads=1"]


def test_a_base_is_made_and_acts(hopper, tmp_path, capsys):
    assert main([*hopper, "--tasks=Hopper-v5"]) == 0
    base = tmp_path / "Hopper-v5"
    made = json.loads((base / "base.json").read_text())
    data = LeRobotDataset("any", root=base / "demonstrations")
    assert made["frames"] == data.num_frames and data.num_episodes == made["episodes"] == 3
    rows = data.hf_dataset.with_format("numpy")
    assert np.array_equal(rows["observation.state"][:], rows["observation.environment_state"][:])
    assert np.isclose(np.sum(rows["next.reward"][:]) / 3, made["demonstrated"], rtol=1e-5)
    assert made["demonstrated"] > 1.0 and set(data.meta.tasks.index) == {"Hop"}
    said = capsys.readouterr().out
    command = next(line for line in said.splitlines() if line.strip().startswith("trimtab eval")).split()[1:]
    few = ["--eval.n_episodes=2", "--eval.batch_size=2", "--eval.constant_candidates=0", "--eval.videos=0"]
    assert main([*command, *few, f"--output_dir={tmp_path / 'eval'}"]) == 0
    found = json.loads((tmp_path / "eval" / "results.json").read_text())["policies"]["base"]
    assert found["success_rate"] is None and found["return_mean"] > 0
    assert main([*hopper, "--tasks=Hopper-v5"]) == 0 and "is there already" in capsys.readouterr().out


def test_agents_stop_at_the_target_and_the_last_ones_are_kept(monkeypatch):
    monkeypatch.setattr(gym_mujoco, "EVERY", 100)
    monkeypatch.setattr(gym_mujoco, "EVALUATED", 1)
    returns = iter([5.0, 20.0, 10.0, 30.0, 40.0, 1.0])
    monkeypatch.setattr(gym_mujoco, "play", lambda *args: [{"next.reward": np.array([next(returns)])}])
    agents = gym_mujoco.medium_agents("Hopper-v5", 0, 35.0)
    assert len(agents) == gym_mujoco.KEPT and next(returns) == 1.0
    assert len({id(agent) for agent in agents}) == gym_mujoco.KEPT, "copies, not one that goes on learning"


REFUSED = {
    "no such suite": (["--suite=gym"], "--suite: there is no 'gym'; choose from metaworld, gym_mujoco"),
    "no such task": (["--suite=gym_mujoco", "--tasks=Ant-v5"], "--tasks: gym_mujoco has no task 'Ant-v5'"),
    "Meta-World's option": (
        ["--suite=gym_mujoco", "--episode_length=50"],
        "--episode_length: is Meta-World's; gym_mujoco has its own",
    ),
    "no episodes": (["--suite=gym_mujoco", "--episodes=0"], "--episodes: must be at least 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_one_line(name, tmp_path, capsys):
    argv, message = REFUSED[name]
    assert main(["base", *argv, f"--output_dir={tmp_path / 'out'}"]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(errors) == 1 and message in errors[0]
    assert not (tmp_path / "out").exists()


def test_an_agent_that_does_not_learn_leaves_nothing(hopper, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(gym_mujoco.LOCOMOTION, "Hopper-v5", (1e9, 125, "Hop"))
    monkeypatch.setattr(gym_mujoco, "MAX_STEPS", 400)
    assert main([*hopper, "--tasks=Hopper-v5"]) == 2
    assert "--seed: Hopper-v5: SAC did not reach a return of" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
