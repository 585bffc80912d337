"""`trimtab probe` on the embedded generalist, a DDPM checkpoint, an ACT checkpoint and a blind policy."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import make_diffusion
from tests.helpers.tiny import make_tiny
from trimtab.adapters.lerobot.diffusion import DiffusionAdapter
from trimtab.recipes.cli import main

PUSHT = ["--env.type=pusht", "--env.obs_type=environment_state_agent_pos"]


def probe(folder, output, *options):
    args = ["probe", f"--policy.path={folder}", "--policy.device=cpu", f"--output_dir={output}"]
    code = main([*args, "--repeats=1", "--machine.threads=1", *options])
    assert code == 0
    assert (output / "probe.png").stat().st_size > 10_000
    return json.loads((output / "probe.json").read_text())


def test_a_base_that_never_succeeds_has_nothing_to_learn_from(tiny_base, tmp_path, capsys):
    task = ["--env.type=metaworld_state", "--env.task=button-press-topdown-v3", "--env.episode_length=60"]
    small = [
        "--eval.n_episodes=4",
        "--eval.batch_size=4",
        "--eval.constant_episodes=2",
        "--eval.baseline_episodes=3",
        "--machine.workers=0",
    ]
    report = probe(tiny_base, tmp_path / "out", *task, *small, "--eval.constant_candidates=3")
    assert set(report["success"]) == {"base", "repeated_noise", "zero_noise", "constant_noise"}
    assert len(report["constants"]) == 3 and all(c["episodes"] == 2 for c in report["constants"])
    # Cloned for thirty steps, it never succeeds: right is to say that there is nothing to learn from.
    assert report["success"]["base"]["successes"] == 0
    assert not report["steerable"] and "nothing seen to learn from" in report["diagnosis"]
    assert "no success in 20 episodes" in report["diagnosis"]
    assert "diagnosis: nothing seen" in capsys.readouterr().out


def test_without_an_environment_the_function_alone_is_measured(tiny_base, tmp_path):
    report = probe(tiny_base, tmp_path / "out")
    assert report["steerable"] and report["deterministic"] and report["success"] == {}
    assert len(report["row_effect"]) == len(report["row_blocks"]) - 1
    assert set(report["seconds"]) == {"encode", "denoise_1", "denoise_16"}


def test_ddpm_checkpoint_is_steered_through_ddim(tmp_path):
    folder = make_diffusion(tmp_path / "ddpm", scheduler="DDPM")
    report = probe(folder, tmp_path / "out")
    assert report["steerable"] and "DDPM" in report["notes"][0] and "DDIM" in report["notes"][0]


def test_act_is_steered_through_its_latent(tmp_path, capsys):
    options = make_tiny("act", tmp_path / "act")
    report = probe(options.path, tmp_path / "out")
    assert report["steerable"] and report["row_effect"] == []
    assert len(report["noise_shape"]) == 1
    assert len(report["column_effect"]) == report["noise_shape"][0]
    assert "diagnosis: can be steered" in capsys.readouterr().out


def test_a_collapsed_act_latent_is_reported_with_its_remedy(tmp_path):
    options = make_tiny("act", tmp_path / "act")
    weights = tmp_path / "act" / "model.safetensors"
    state = load_file(weights)
    state["model.encoder_latent_input_proj.weight"] = torch.zeros_like(
        state["model.encoder_latent_input_proj.weight"]
    )
    save_file(state, weights)
    report = probe(options.path, tmp_path / "out")
    assert not report["steerable"] and "ignores its noise" in report["diagnosis"]
    assert "kl_weight" in report["lines"][0]


def test_a_policy_that_ignores_its_noise_is_found_out_and_spends_no_episode(tmp_path):
    """A live network that does not look at its noise; rounding differs by place in the batch."""
    folder = make_diffusion(tmp_path / "blind", prediction_type="sample")
    state = load_file(folder / "model.safetensors")
    for name in ("conv1.block.0.weight", "residual_conv.weight"):  # the U-Net's view of the noisy chunk
        key = f"diffusion.unet.down_modules.0.0.{name}"
        state[key] = torch.zeros_like(state[key])
    save_file(state, folder / "model.safetensors")
    report = probe(folder, tmp_path / "out", *PUSHT)
    assert not report["steerable"] and "ignores its noise" in report["diagnosis"]
    assert report["noise_difference"] <= report["floor"]
    assert report["success"] == {}  # no episode is spent on a policy that cannot be steered


@pytest.mark.parametrize(
    ("part", "error", "said"),
    [
        ("encode", KeyError("camera_9"), "KeyError: 'camera_9'"),
        (
            "denoise",
            RuntimeError("mat1 and mat2 shapes\ncannot be multiplied"),
            "RuntimeError: mat1",
        ),
        ("denoise", ZeroDivisionError(), "ZeroDivisionError"),
    ],
)
@pytest.mark.parametrize("options", [[], PUSHT], ids=["alone", "pusht"])
def test_a_policy_that_raises_while_it_is_measured_is_a_one_line_error(
    part, error, said, options, tmp_path, capsys, monkeypatch
):
    folder = make_diffusion(tmp_path / "policy")

    whole, calls = getattr(DiffusionAdapter, part), []

    def broken(self, *args, **named):
        calls.append(part)
        if options and len(calls) < 3:  # past the first look at the environment
            return whole(self, *args, **named)
        raise error

    monkeypatch.setattr(DiffusionAdapter, part, broken)
    args = ["probe", f"--policy.path={folder}", "--policy.device=cpu", "--machine.workers=0", *options]
    assert main([*args, f"--output_dir={tmp_path / 'out'}"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert said in line and "--policy.path: " in line
    assert not (tmp_path / "out").exists()


def test_an_environment_that_fails_while_a_policy_is_measured_is_a_one_line_error(
    tmp_path, capsys, monkeypatch
):
    """In this process, where its exception is not a worker's."""
    from gym_pusht.envs.pusht import PushTEnv

    step = PushTEnv.step

    def failing(self, action):
        self.taken = getattr(self, "taken", 0) + 1
        if self.taken > 20:
            raise OSError("the camera is gone")
        return step(self, action)

    monkeypatch.setattr(PushTEnv, "step", failing)
    folder = make_diffusion(tmp_path / "policy")
    args = [f"--policy.path={folder}", "--policy.device=cpu", "--machine.workers=0", *PUSHT]
    for command in ("probe", "eval"):
        assert main([command, *args, f"--output_dir={tmp_path / command}"]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
        assert "--env.type: OSError: the camera is gone" in line


def test_a_task_that_the_base_does_not_know_is_refused(tiny_base, tmp_path, capsys):
    args = ["probe", f"--policy.path={tiny_base}", "--policy.device=cpu", f"--output_dir={tmp_path / 'o'}"]
    assert main([*args, "--env.type=metaworld_state", "--env.task=hammer-v3"]) == 2
    assert "--env.task" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--noises=1", "--observations=1", "--repeats=-1", "--seed=-1"])
def test_an_option_out_of_range_is_refused(option, tmp_path, capsys):
    assert main(["probe", "--policy.path=x", f"--output_dir={tmp_path / 'o'}", option]) == 2
    assert option.split("=")[0] in capsys.readouterr().err
