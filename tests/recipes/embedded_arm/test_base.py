"""The arm's base: recorded as LeRobot's robots are, and run by LeRobot on the arm."""

import json

import numpy as np
import pytest
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies.factory import make_pre_post_processors
from lerobot.scripts.lerobot_rollout import main as rollout

from tests.helpers.lerobot_commands import run
from tests.helpers.steered import artefact_of
from trimtab.adapters import PolicyConfig, UserError, load_adapter
from trimtab.recipes.cli import main
from trimtab.recipes.embedded_arm import MujocoArm, MujocoArmConfig
from trimtab.recipes.embedded_arm.arm import PARKED


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    root = tmp_path_factory.mktemp("arm")
    argv = ["base", "--suite=arm", "--episodes=4", "--cloning.steps=5", "--threads=1"]
    assert main([*argv, f"--output_dir={root}"]) == 0
    return root / "push"


def test_the_demonstrations_are_the_robots(base, tmp_path):
    made = json.loads((base / "base.json").read_text())
    data = LeRobotDataset("any", root=base / "demonstrations")
    robot = MujocoArm(MujocoArmConfig(calibration_dir=tmp_path))
    assert data.features["observation.state"]["names"] == [*robot.observation_features]
    assert data.features["action"]["names"] == [*robot.action_features]
    assert data.fps == robot.config.fps and made["cloning"]["n_action_steps"] == 8
    rows = data.hf_dataset.with_format("numpy")
    ended = rows["next.done"][:].ravel()
    assert ended.sum() == 4 and rows["next.success"][:].ravel()[ended].mean() == made["demonstrated"]
    assert set(data.meta.tasks.index) == {"push the cube beyond the line"}
    steps = np.diff(np.flatnonzero(ended), prepend=-1)
    assert steps.min() > 15 and steps.max() < 60, "nobody goes on once the cube is pushed or missed"
    assert 0 < made["demonstrated"] < 1


def test_it_does_without_an_environments_state(base):
    config = PreTrainedConfig.from_pretrained(base)
    before, _ = make_pre_post_processors(config, pretrained_path=str(base))
    state = torch.arange(7.0)
    batch = before({"observation.state": state})
    assert torch.equal(batch["observation.state"], batch["observation.environment_state"])
    adapter = load_adapter(PolicyConfig(path=str(base)))
    seen = {"observation.state": state[None, None]}
    noise = torch.zeros(1, *adapter.noise_spec.shape)
    chunks = [
        adapter.denoise(adapter.observe(seen | more), noise)
        for more in ({}, {"observation.environment_state": state[None, None]})
    ]
    assert torch.equal(*chunks)
    other = adapter.observe(seen | {"observation.environment_state": state[None, None] + 5})
    assert not torch.equal(chunks[0], adapter.denoise(other, noise)), "one that is given is taken"
    with pytest.raises(UserError, match=r"needs observation\.state"):
        adapter.observe({"observation.environment_state": state[None, None]})


@pytest.mark.parametrize("steered", [False, True])
def test_lerobot_rollout_runs_it_on_the_arm(base, steered, tmp_path, monkeypatch):
    folder, sent = base, []
    if steered:
        artefact_of(PolicyConfig(path=str(base)), tmp_path / "artefact")
        folder = tmp_path / "artefact"
    real = MujocoArm.send_action
    monkeypatch.setattr(MujocoArm, "send_action", lambda self, a: sent.append(dict(a)) or real(self, a))
    argv = [
        f"--policy.path={folder}", "--robot.type=mujoco_arm", "--robot.clock=step", "--task=push",
        "--duration=1", "--fps=30", "--return_to_initial_position=false", "--play_sounds=false",
        f"--robot.calibration_dir={tmp_path}",
    ]  # fmt: skip
    run(rollout, argv, monkeypatch)
    assert len(sent) > 8 and all([*action] == [*PARKED] for action in sent)
    assert np.ptp([[*action.values()] for action in sent], 0)[:4].min() > 0.1
