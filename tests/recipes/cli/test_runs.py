"""Whole runs, as a user would start them: real LeRobot, real simulators, small budgets."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.helpers import lerobot_commands
from tests.helpers.small_runs import HERE, POLICIES, SMALL, check_results
from trimtab.adapters import PolicyConfig, UserError
from trimtab.adapters.checkpoint.files import POSTPROCESSOR, PREPROCESSOR, state_files
from trimtab.adapters.checkpoint.identity import file_hash
from trimtab.policies.artefact import is_artefact, load_artefact
from trimtab.recipes.cli import main

ENV = ["--env.type=metaworld_state", "--env.task=drawer-close-v3", "--env.episode_length=20"]


@pytest.fixture(scope="module")
def run(tiny_base, tmp_path_factory):
    """A steering run on the embedded base, started as a command of its own."""
    output = tmp_path_factory.mktemp("run") / "out"
    before = file_hash(tiny_base)
    trimtab = str(Path(sys.executable).with_name("trimtab"))
    command = [trimtab, "adapt", f"--policy.path={tiny_base}", *ENV, *SMALL, f"--output_dir={output}"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert file_hash(tiny_base) == before
    return output, done


def test_adapt_leaves_everything_behind(run):
    output, done = run
    assert "steered" in done.stdout and "95 % interval" in done.stdout
    assert "success" in done.stderr, "the progress bar shows the running success rate"
    assert "s of training: the learner waited for the environments" in done.stdout
    names = {path.name for path in output.iterdir()}
    assert {"artefact", "metrics.jsonl", "results.json", "config.json", "curve.png"} <= names
    results = check_results(output, POLICIES, 6)
    assert results["env_steps"] >= 120 and results["base_sha256"]
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) >= 3 and lines[-1]["updates"] > 0
    assert (output / "curve.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    if "no video" not in done.stdout:
        assert {"before.mp4", "after.mp4"} <= names


def test_artefact_is_small_whole_and_without_pickle(run):
    artefact = run[0] / "artefact"
    expected = ["config.json", "model.safetensors", PREPROCESSOR, POSTPROCESSOR, *state_files(artefact)]
    assert sorted(path.name for path in artefact.iterdir()) == sorted(expected)
    assert {path.suffix for path in artefact.iterdir()} == {".json", ".safetensors"}
    assert sum(path.stat().st_size for path in artefact.iterdir()) < 5e6
    assert is_artefact(str(artefact)) and not is_artefact(str(run[0]))


def test_eval_of_the_artefact_repeats_the_runs_own_numbers(run, tmp_path, capsys):
    artefact = run[0] / "artefact"
    code = main(
        ["eval", f"--policy.path={artefact}", *ENV, "--eval.n_episodes=6", "--eval.batch_size=2",
         "--eval.constant_candidates=2", "--eval.constant_episodes=2", "--eval.videos=0", HERE,
         "--policy.device=cpu", f"--output_dir={tmp_path / 'out'}"]
    )  # fmt: skip
    assert code == 0 and "best constant noise" in capsys.readouterr().out
    first = json.loads((run[0] / "results.json").read_text())["policies"]
    second = check_results(tmp_path / "out", POLICIES, 6)["policies"]
    for name in POLICIES:
        assert first[name]["successes"] == second[name]["successes"], name


def test_config_yaml_runs_again(run, tmp_path, capsys):
    argv = ["adapt", f"--config_path={run[0] / 'config.json'}", f"--output_dir={tmp_path / 'again'}"]
    assert main([*argv, "--eval.videos=0", HERE]) == 0
    capsys.readouterr()

    def losses(folder):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in line.items() if not k.startswith("seconds")} for line in lines]

    assert losses(tmp_path / "again") == losses(run[0])


def test_artefact_and_base_move_together(run, tiny_base, tmp_path):
    import shutil

    shutil.copytree(run[0] / "artefact", tmp_path / "moved" / "runs" / "artefact")
    config = json.loads((run[0] / "artefact" / "config.json").read_text())
    path = Path(config["base"]["path"])
    assert not path.is_absolute()
    target = (tmp_path / "moved" / "runs" / "artefact" / path).resolve()
    if target.exists():
        pytest.skip("the relative path leads back to the original here")
    with pytest.raises(UserError, match=r"the base policy of .* is not where it was"):
        load_artefact(PolicyConfig(path=str(tmp_path / "moved" / "runs" / "artefact"), device="cpu"))
    shutil.copytree(tiny_base, target)
    moved = load_artefact(PolicyConfig(path=str(tmp_path / "moved" / "runs" / "artefact"), device="cpu"))
    original = load_artefact(PolicyConfig(path=str(run[0] / "artefact"), device="cpu"))
    features, prior = torch.randn(4, 89), torch.randn(4, 8, 4)
    assert torch.equal(moved.actor.act(features, prior), original.actor.act(features, prior))


def test_a_base_that_changed_is_caught(run, tiny_base, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    base = shutil.copytree(tiny_base, tmp_path / "base")
    artefact = shutil.copytree(run[0] / "artefact", tmp_path / "artefact")
    config = json.loads((artefact / "config.json").read_text())
    config["base"]["path"] = "../base"
    (artefact / "config.json").write_text(json.dumps(config))
    load_artefact(PolicyConfig(path=str(artefact), device="cpu"))
    tensors = load_file(str(base / "model.safetensors"))
    tensors[next(iter(tensors))].view(-1)[0] += 1e-3
    save_file(tensors, str(base / "model.safetensors"))
    with pytest.raises(UserError, match="its weights have another hash"):
        load_artefact(PolicyConfig(path=str(artefact), device="cpu"))


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: (f / "model.safetensors").unlink(), "not a whole artefact"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 40), "truncated or no safetensors"),
        (lambda f: (f / "config.json").write_text('{"type": "trimtab"}'), "is not an artefact's config"),
    ],
)
def test_damaged_artefact(run, tiny_base, tmp_path, damage, message):
    import shutil

    artefact = shutil.copytree(run[0] / "artefact", tmp_path / "artefact")
    config = json.loads((artefact / "config.json").read_text())
    config["base"]["path"] = str(tiny_base)
    (artefact / "config.json").write_text(json.dumps(config))
    damage(artefact)
    with pytest.raises(UserError, match=message):
        load_artefact(PolicyConfig(path=str(artefact), device="cpu"))


def test_steering_a_steered_policy_is_refused(run, capsys, tmp_path):
    argv = ["adapt", f"--policy.path={run[0] / 'artefact'}", *ENV, f"--output_dir={tmp_path / 'out'}"]
    assert main(argv) == 2
    assert "is already steered" in capsys.readouterr().err


def test_lerobot_eval_runs_the_base_as_it_is(tiny_base, tmp_path, monkeypatch):
    """In our environment. (That a process of its own finds it, with no flag of ours: `test_export.py`.)"""
    from lerobot.scripts.lerobot_eval import main as lerobot_eval

    options = [
        f"--policy.path={tiny_base}", "--policy.device=cpu", *ENV[:2], "--env.episode_length=12",
        "--eval.n_episodes=2", "--eval.batch_size=2", "--eval.use_async_envs=false",
        f"--output_dir={tmp_path / 'eval'}",
    ]  # fmt: skip
    try:
        lerobot_commands.run(lerobot_eval, options, monkeypatch)
    except Exception as error:
        if "gladLoadGL" not in str(error):
            raise
        pytest.skip("lerobot-eval renders, and this machine cannot")
    info = json.loads((tmp_path / "eval" / "eval_info.json").read_text())
    assert info["overall"]["n_episodes"] == 2


def record_pusht(root, episodes=2, steps=30):
    """Random pushes, recorded as a user would record a robot."""
    import gym_pusht  # noqa: F401 - registers the environment
    import gymnasium
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    features = {
        "observation.state": {"dtype": "float32", "shape": (2,), "names": None},
        "observation.environment_state": {"dtype": "float32", "shape": (16,), "names": None},
        "action": {"dtype": "float32", "shape": (2,), "names": None},
    }
    dataset = LeRobotDataset.create("local/pusht", fps=10, features=features, root=root, use_videos=False)
    env = gymnasium.make("gym_pusht/PushT-v0", obs_type="environment_state_agent_pos")
    rng = np.random.default_rng(0)
    for episode in range(episodes):
        observation, _ = env.reset(seed=episode)
        for _ in range(steps):
            action = np.clip(observation["agent_pos"] + rng.normal(0, 40, 2), 0, 512).astype(np.float32)
            dataset.add_frame(
                {
                    "observation.state": observation["agent_pos"].astype(np.float32),
                    "observation.environment_state": observation["environment_state"].astype(np.float32),
                    "action": action,
                    "task": "push the T",
                }
            )
            observation, *_ = env.step(action)
        dataset.save_episode()
    dataset.finalize()


def test_policy_of_lerobot_train_is_steered_on_pusht(tmp_path, capsys, monkeypatch):
    """Record, `lerobot-train` a diffusion policy with LeRobot's defaults (DDPM, two observations), adapt."""
    from lerobot.scripts.lerobot_train import main as lerobot_train

    record_pusht(tmp_path / "data")
    options = [
        "--dataset.repo_id=local/pusht", f"--dataset.root={tmp_path / 'data'}",
        "--policy.type=diffusion", "--policy.device=cpu", "--policy.push_to_hub=false",
        "--policy.horizon=16", "--policy.n_action_steps=8", "--policy.down_dims=[16,32]",
        "--steps=3", "--batch_size=4", "--num_workers=0", "--save_freq=3",
        "--env_eval_freq=0", "--wandb.enable=false", f"--output_dir={tmp_path / 'train'}",
    ]  # fmt: skip
    lerobot_commands.run(lerobot_train, options, monkeypatch)
    policy = tmp_path / "train" / "checkpoints" / "000003" / "pretrained_model"
    code = main(
        ["adapt", f"--policy.path={policy}", "--env.type=pusht", "--env.episode_length=24",
         "--env.obs_type=environment_state_agent_pos", *SMALL, HERE, "--noise.type=repeat",
         f"--output_dir={tmp_path / 'out'}"]
    )  # fmt: skip
    text = capsys.readouterr().out
    assert code == 0
    assert "switched to DDIM with 10 steps" in text
    check_results(tmp_path / "out", POLICIES, 6)
    if "no video" not in text:
        assert (tmp_path / "out" / "after.mp4").stat().st_size > 1000
    code = main(
        ["eval", f"--policy.path={tmp_path / 'out' / 'artefact'}", "--env.type=pusht",
         "--env.obs_type=environment_state_agent_pos", "--env.episode_length=24", "--eval.n_episodes=3",
         "--eval.constant_candidates=0", "--eval.videos=0", "--policy.device=cpu", HERE,
         f"--output_dir={tmp_path / 'eval'}"]
    )  # fmt: skip
    assert code == 0
    check_results(tmp_path / "eval", ["base", "zero_noise", "steered"], 3)


def test_nan_in_the_middle_of_a_run_leaves_no_artefact(tiny_base, tmp_path, capsys, monkeypatch):
    from trimtab.rl.envs.metaworld import MetaworldStateEnv

    original = MetaworldStateEnv.step

    def poisoned(self, action):
        observation, *rest = original(self, action)
        seed = self.np_random_seed
        if seed >= 100_000_000 and self._steps == 7:  # training seeds only
            observation["agent_pos"][0] = np.nan
        return observation, *rest

    monkeypatch.setattr(MetaworldStateEnv, "step", poisoned)
    argv = ["adapt", f"--policy.path={tiny_base}", *ENV, *SMALL[1:], "--train.env_steps=240", HERE]
    assert main([*argv, f"--output_dir={tmp_path / 'out'}"]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(error) == 1 and "NaN or Inf in its observation 'agent_pos'" in error[0]
    assert not (tmp_path / "out" / "artefact").exists()
    for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines():
        json.loads(line)


def test_demo_end_to_end(tmp_path, capsys):
    """The demo's own path with a base of two tasks cloned for a moment."""
    argv = ["demo", "--task=drawer-close", "--base.tasks=drawer-close,reach", "--base.demonstrators={}"]
    argv += ["--base.episodes=2", "--base.episode_length=20", "--base.cloning.steps=10"]
    argv += [option for option in SMALL if not option.startswith("--policy")]
    argv += [
        "--other_task_episodes=2",
        f"--cache_dir={tmp_path / 'cache'}",
        f"--output_dir={tmp_path / 'out'}",
    ]
    assert main(argv) == 0
    text = capsys.readouterr().out
    assert "base file unchanged" in text and "reach-v3" in text
    results = check_results(tmp_path / "out", POLICIES, 6)
    assert results["other_tasks"]["unchanged"] is True
    assert results["other_tasks"]["before"] == results["other_tasks"]["after"]
    assert list(results["other_tasks"]["after"]) == ["reach-v3"]


def test_base_command(tmp_path, capsys):
    output = tmp_path / "base"
    argv = [
        "base",
        "--tasks=reach-v3,window-open",
        "--episodes=2",
        "--episode_length=15",
        "--cloning.steps=5",
    ]
    argv += ["--demonstrators={window-open: {kind: shift, p_bad: 0.5, offset: 0.05}}"]
    assert main([*argv, f"--output_dir={output}"]) == 0
    assert "Try it" in capsys.readouterr().out
    made = json.loads((output / "base.json").read_text())
    assert made["tasks"] == ["reach-v3", "window-open-v3"]
    assert made["demonstrators"]["window-open-v3"]["offset"] == 0.05
    assert main([*argv, f"--output_dir={output}"]) == 2
    assert "exists; name another" in capsys.readouterr().err


def test_best_of_n_repeats_exactly_and_behind_the_gate(tiny_base, tmp_path):
    def adapt(name):
        output = tmp_path / name
        options = ["--rl.type=best_of_n", "--rl.num_candidates=4", "--rl.target_candidates=2"]
        small = [o for o in SMALL if not o.startswith(("--rl.type", "--eval.videos"))]
        argv = ["adapt", f"--policy.path={tiny_base}", *ENV, *small, *options, "--eval.videos=0", HERE]
        gate = ["--train.gate.enabled=true", "--train.warmup_transitions=0"]
        assert main([*argv, *gate, f"--output_dir={output}"]) == 0
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in line.items() if not k.startswith("seconds")} for line in lines]

    lines = adapt("first")
    assert any("rank_correlation" in line for line in lines) and 0.0 <= lines[-1]["gate_share"] <= 1.0
    assert is_artefact(str(tmp_path / "first" / "artefact"))
    assert adapt("second") == lines


def test_space_that_an_algorithm_cannot_learn_in_is_refused_at_once(tiny_base, tmp_path, capsys):
    argv = ["adapt", f"--policy.path={tiny_base}", *ENV, "--rl.type=best_of_n", "--noise.type=residual"]
    assert main([*argv, "--policy.device=cpu", f"--output_dir={tmp_path / 'out'}"]) == 2
    output = capsys.readouterr()
    assert "--noise.type: best_of_n distils" in output.err and "base policy:   0%" not in output.err
    assert not (tmp_path / "out").exists()


def test_vision_language_policy_is_steered_from_pixels(tmp_path, capsys, monkeypatch):
    """A tiny SmolVLA on pusht's camera: probe, adapt in bfloat16, as after `accelerate launch` with
    mixed precision, and eval of an artefact that knows backbone and precision.
    """
    from tests.helpers.tiny import make_tiny
    from trimtab.adapters.tiny.parts import camera_features

    features = camera_features(1, 96, state_dim=2, action_dim=2)
    options = make_tiny("smolvla", tmp_path / "policy", **features)
    env = ["--env.type=pusht", "--env.obs_type=pixels_agent_pos", "--env.episode_length=12"]
    episodes = ["--eval.n_episodes=2", "--eval.batch_size=2", "--eval.constant_candidates=0"]
    machine = ["--policy.device=cpu", "--machine.workers=0", "--machine.threads=1"]
    base = [
        f"--policy.path={options.path}",
        f"--policy.backbone={options.backbone}",
        *env,
        *episodes,
        *machine,
    ]
    assert (
        main(["probe", *base, "--observations=4", "--repeats=0", f"--output_dir={tmp_path / 'probe'}"]) == 0
    )
    report = json.loads((tmp_path / "probe" / "probe.json").read_text())
    assert report["deterministic"] and report["success"]["base"]["episodes"] == 2
    train = ["--train.env_steps=48", "--train.first_update=4", "--train.warmup_transitions=4"]
    small = ["--num_envs=2", "--rl.batch_size=8", "--eval.videos=0", "--noise.type=repeat"]
    output = tmp_path / "out"
    small += ["--policy.dtype=bfloat16", "--rl.type=best_of_n"]
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert main(["adapt", *base, *train, *small, f"--output_dir={output}"]) == 0
    assert "accelerate's mixed_precision=bf16 changes nothing here" in capsys.readouterr().out
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["updates"] > 0 and "faults" not in lines[-1]
    assert json.loads((output / "artefact" / "config.json").read_text())["base"]["dtype"] == "bfloat16"
    steered = load_artefact(PolicyConfig(path=str(output / "artefact"), device="cpu"))
    kinds = {weight.dtype for weight in steered.adapter.policy.parameters()}
    assert torch.bfloat16 in kinds and {w.dtype for w in steered.actor.parameters()} == {torch.float32}
    again = [f"--policy.path={output / 'artefact'}", *env, *episodes, *machine, "--eval.videos=0"]
    assert main(["eval", *again, f"--output_dir={tmp_path / 'eval'}"]) == 0
    assert "steered" in capsys.readouterr().out
    check_results(tmp_path / "eval", ["base", "zero_noise", "steered"], 2)


def test_images_and_state_steer_a_policy_from_pixels(tmp_path, capsys):
    """A tiny DiffusionPolicy on pusht's camera, whose actor and critic see the camera themselves: adapt,
    eval of the artefact, export. (LeRobot's path to the same actions: `tests/policies/test_observe.py`.)
    """
    from tests.helpers.tiny import make_tiny
    from trimtab.adapters.tiny.parts import camera_features

    key = "observation.image"
    features = camera_features(1, 96, state_dim=2, action_dim=2)
    options = make_tiny("diffusion", tmp_path / "policy", n_obs_steps=2, n_action_steps=6, **features)
    env = ["--env.type=pusht", "--env.obs_type=pixels_agent_pos", "--env.episode_length=12"]
    episodes = [
        "--eval.n_episodes=1",
        "--eval.batch_size=1",
        "--eval.constant_candidates=0",
        "--eval.videos=0",
    ]
    machine = ["--policy.device=cpu", "--machine.workers=0", "--machine.threads=1"]
    train = ["--train.env_steps=48", "--train.first_update=4", "--train.warmup_transitions=4"]
    observe = ["--observe.inputs=[state, images, task]", "--observe.image_size=32"]
    small = ["--num_envs=2", "--rl.batch_size=8", "--noise.type=repeat", "--rl.type=best_of_n"]
    small += ["--rl.num_candidates=2", "--rl.target_candidates=2", "--rl.edit.scale=0.1"]
    output = tmp_path / "out"
    base = [f"--policy.path={options.path}", *env, *episodes, *machine]
    assert main(["adapt", *base, *train, *small, *observe, f"--output_dir={output}"]) == 0
    config = json.loads((output / "artefact" / "config.json").read_text())
    assert config["observe"]["inputs"] == ["state", "images", "task"]
    assert config["observe"]["cameras"] == [key] and config["observe"]["tasks"] == [""]
    assert config["feature_dim"] == 2 * 2 + 1
    again = [f"--policy.path={output / 'artefact'}", *env, *episodes, *machine]
    assert main(["eval", *again, f"--output_dir={tmp_path / 'eval'}"]) == 0
    check_results(tmp_path / "eval", ["base", "zero_noise", "steered"], 1)
    assert main(["export", f"--run={output}", f"--output_dir={tmp_path / 'export'}"]) == 0
    steered = load_artefact(PolicyConfig(path=str(tmp_path / "export"), device="cpu"))
    assert steered.config.observe == steered.adapter.observer.config
    assert steered.actor.encoder.image_shape == (3, 32, 32)
    assert steered.critic is not None and steered.edit.scale == 0.1
    saved = load_file(output / "artefact" / "model.safetensors")
    actor = steered.actor.state_dict()
    assert saved.keys() == actor.keys() and all(torch.equal(saved[name], actor[name]) for name in saved)
    seen = torch.zeros(2, 5 + 3 * 32 * 32)
    seen[1, 5:] = torch.randint(0, 256, (3 * 32 * 32,), generator=torch.Generator().manual_seed(0))
    noise = steered.actor.act(seen, torch.zeros(2, *steered.adapter.noise_spec.shape), deterministic=True)
    assert not torch.equal(noise[0], noise[1])  # an actor that has not learnt is blind to them
    capsys.readouterr()
    assert main(["adapt", *base, "--observe.inputs=[smell]"]) == 2
    assert "--observe.inputs: takes some of features" in capsys.readouterr().err
