"""LIBERO by LeRobot's own environment: what is rendered is what LeRobot renders, and no more is."""

import importlib.util
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest

from trimtab.adapters import UserError
from trimtab.recipes.cli import main
from trimtab.rl.envs import libero
from trimtab.rl.envs.chunk import ChunkEnv
from trimtab.rl.envs.hooks import make_single_env

installed = pytest.mark.skipif(
    importlib.util.find_spec("libero") is None or importlib.util.find_spec(libero.ASSETS) is None,
    reason=f"LIBERO is not installed: {libero.INSTALL}",
)
SMALL = {
    "task": "libero_spatial",
    "task_ids": [0],
    "observation_height": 64,
    "observation_width": 64,
    "episode_length": 24,
}


@pytest.mark.parametrize("missing", ["libero", libero.ASSETS])
def test_what_is_not_installed_is_said_in_a_line(missing, monkeypatch, tmp_path):
    found = importlib.util.find_spec
    (tmp_path / "libero").mkdir()

    def find_spec(name, *arguments):
        if name == missing:
            return None
        if name == "libero":  # there, with no meshes in it
            return importlib.machinery.PathFinder.find_spec("libero", [str(tmp_path)])
        return found(name, *arguments)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    with pytest.raises(UserError, match=r"--env.type: LIBERO.* not installed: uv pip install '.*\[libero\]'"):
        libero.prepare()


@installed
def test_frames_are_those_of_lerobot_and_only_those_that_are_looked_at(tmp_path, monkeypatch):
    """The same two chunks in LeRobot's environment, step by step, and in ours, with and without shadows."""
    monkeypatch.setenv("LIBERO_CONFIG_PATH", str(tmp_path))
    libero.prepare()
    from lerobot.envs.libero import LiberoEnv

    actions = np.random.default_rng(0).uniform(-0.5, 0.5, (2, 10, 7)).astype(np.float32)
    ours, plain = (make_single_env(libero.LiberoChunksConfig(**SMALL))[0] for _ in range(2))
    plain.__class__ = LiberoEnv
    plain.init_state_id = 3
    expected, seconds = [plain.reset(seed=3)[0]], {}
    started = time.perf_counter()
    for action in actions.reshape(-1, 7):
        expected.append(plain.step(action)[0])
    seconds["every step"] = time.perf_counter() - started
    plain.close()
    env = ChunkEnv(ours)
    found = [env.reset(3)]
    started = time.perf_counter()
    found += [env.step_chunk(chunk).observation for chunk in actions]
    seconds["every chunk"] = time.perf_counter() - started
    for one, other in zip(found, expected[::10], strict=True):
        for camera in ("image", "image2"):
            assert other["pixels"][camera].std() > 10
            assert np.array_equal(one["pixels"][camera][-1], other["pixels"][camera])
        assert np.array_equal(one["robot_state"]["joints"]["pos"][-1], other["robot_state"]["joints"]["pos"])
    last = env.step_chunk(actions[0])  # the time limit cuts it short, and is looked at too
    assert last.truncated and last.steps == 4
    assert not np.array_equal(last.final_observation["pixels"]["image"], found[-1]["pixels"]["image"])
    assert ours.render().std() > 10
    ours.shadows = False
    again = env.reset(3)
    gap = np.abs(again["pixels"]["image"].astype(float) - found[0]["pixels"]["image"]).mean()
    assert 0.2 < gap < 30.0
    ours.shadows = True
    assert np.array_equal(env.reset(3)["pixels"]["image2"], found[0]["pixels"]["image2"])  # by its seed alone
    env.close()
    assert seconds["every chunk"] < 0.5 * seconds["every step"]


@installed
@pytest.mark.skipif(not os.environ.get("TRIMTAB_LIBERO"), reason="takes minutes; set TRIMTAB_LIBERO=1")
def test_a_tiny_smolvla_is_probed_steered_exported_and_evaluated_by_lerobot(tmp_path, monkeypatch):
    from lerobot.configs import FeatureType, PolicyFeature

    from tests.helpers.tiny import make_tiny

    monkeypatch.setenv("LIBERO_CONFIG_PATH", str(tmp_path / "config"))
    names = ("observation.images.image", "observation.images.image2")
    cameras = {name: PolicyFeature(FeatureType.VISUAL, (3, 64, 64)) for name in names}
    policy = make_tiny(
        "smolvla",
        tmp_path / "policy",
        input_features={"observation.state": PolicyFeature(FeatureType.STATE, (8,)), **cameras},
        output_features={"action": PolicyFeature(FeatureType.ACTION, (7,))},
        max_action_dim=8,
        n_action_steps=8,
    )
    size = ["--env.observation_height=64", "--env.observation_width=64"]
    task = ["--env.task=libero_spatial", "--env.task_ids=[0]", *size]
    base = [
        *(f"--policy.path={policy.path}", f"--policy.backbone={policy.backbone}", "--policy.device=cpu"),
        *("--env.type=libero_chunks", *task, "--env.episode_length=40", "--env.shadows=false"),
        *("--eval.n_episodes=1", "--eval.batch_size=1", "--eval.constant_candidates=0"),
        "--machine.workers=0",
    ]
    probe = ["probe", *base, "--observations=2", "--repeats=0", f"--output_dir={tmp_path / 'probe'}"]
    assert main(probe) == 0
    run = tmp_path / "run"
    train = [
        *("--train.env_steps=240", "--train.warmup_transitions=8", "--train.first_update=8"),
        *("--num_envs=1", "--rl.batch_size=8", "--rl.type=dsrl_sac", "--noise.type=repeat"),
        *("--eval.videos=0", f"--output_dir={run}"),
    ]
    assert main(["adapt", *base, *train]) == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["env_steps"] >= 240 and lines[-1]["updates"] > 20 and "faults" not in lines[-1]
    assert main(["export", f"--run={run}", f"--output_dir={tmp_path / 'export'}"]) == 0
    evaluate = (
        "from trimtab.rl.envs.libero import prepare; prepare(); "
        "from lerobot.scripts.lerobot_eval import main; main()"
    )
    command = [
        *(sys.executable, "-c", evaluate, f"--policy.path={tmp_path / 'export'}", "--policy.device=cpu"),
        *("--env.type=libero", *task, "--env.episode_length=16"),
        *("--eval.n_episodes=1", "--eval.batch_size=1", f"--output_dir={tmp_path / 'eval'}"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "eval" / "eval_info.json").read_text())
    assert found["overall"]["n_episodes"] == 1
