"""The paper's settings: one flag and the files say the same, explicit options win, and they run."""

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from tests.helpers.point import PointAdapter, PointConfig
from trimtab.adapters import UserError
from trimtab.recipes.cli.adapt import AdaptConfig
from trimtab.recipes.support.option_dicts import flatten
from trimtab.recipes.support.options import parse
from trimtab.rl.algorithms.presets import PAPER
from trimtab.rl.envs.vector import ChunkVectorEnv
from trimtab.rl.runner import PolicyRunner
from trimtab.rl.trainer import Trainer

FOLDER = Path(__file__).parents[3] / "recipes" / "configs" / "metaworld"
FILES = {"dsrl_sac": FOLDER / "paper_sac.yaml", "dsrl_na": FOLDER / "paper_na.yaml"}
ENV = ["--env.type=metaworld_state", "--env.task=button-press-topdown-v3"]


def read(*args):
    return parse(AdaptConfig, "adapt", list(args))


def settings(config):
    found = {name: asdict(getattr(config, name)) for name in ("rl", "noise", "train")}
    return flatten(found | {"num_envs": config.num_envs}) | {
        "rl.type": config.rl.type,
        "noise.type": config.noise.type,
    }


@pytest.mark.parametrize("name", PAPER)
def test_flag_and_file_say_the_same(name):
    by_flag = settings(read(*ENV, f"--rl.type={name}", "--rl.preset=paper"))
    assert by_flag == settings(read(f"--config_path={FILES[name]}"))
    assert by_flag == settings(read(f"--config_path={FILES[name]}", "--rl.preset=paper"))
    for option, value in flatten(PAPER[name]).items():
        assert by_flag[option] == value, option
    assert by_flag["rl.backup_entropy"] and by_flag["rl.target_entropy"] == 0.0


def test_explicit_options_win(tmp_path):
    config = read("--rl.preset=paper", *ENV, "--rl.n_step=3", "--noise.bound", "2.5", "--rl.actor.hidden=64")
    assert (config.rl.type, config.rl.n_step, config.noise.bound) == ("dsrl_sac", 3, 2.5)
    assert (config.rl.actor.hidden, config.rl.actor.activation, config.rl.critic.hidden) == (64, "tanh", 128)
    file = tmp_path / "mine.yaml"
    file.write_text("rl: {type: dsrl_na, tau: 0.01}\ntrain: {env_steps: 500}\n")
    config = read(f"--config_path={file}", *ENV, "--rl.preset", "paper", "--rl.mode=stored")
    assert (config.rl.type, config.rl.tau, config.rl.mode) == ("dsrl_na", 0.01, "stored")
    assert (config.train.env_steps, config.train.updates_per_transition) == (500, 5.0)


def test_default_is_no_preset_and_others_are_refused():
    assert settings(read(*ENV, "--rl.preset=default")) == settings(read(*ENV))
    with pytest.raises(UserError, match=r"--rl.preset: 'fast' is none of default, paper"):
        read(*ENV, "--rl.preset=fast")
    with pytest.raises(UserError, match=r"--rl.preset: best_of_n has no paper preset"):
        read(*ENV, "--rl.type=best_of_n", "--rl.preset=paper")


@pytest.mark.parametrize("name", PAPER)
def test_files_run(name):
    """A few steps, narrower; counted as the reference does: 5 updates per transition after the warm-up."""
    narrow = ["--rl.actor.hidden=16", "--rl.critic.hidden=16", "--rl.batch_size=16"]
    short = ["--train.env_steps=200", "--train.warmup_transitions=60", "--train.first_update=60"]
    config = read(f"--config_path={FILES[name]}", *narrow, *short)
    lines, env = [], PointConfig()
    with ChunkVectorEnv(env, config.num_envs, 0) as vec:
        trainer = Trainer(
            PolicyRunner(PointAdapter(), env),
            vec,
            Accelerator(cpu=True),
            config.train,
            config.rl,
            config.noise,
            on_metrics=lines.append,
            progress=False,
        )
        trainer.run()
    paid = trainer.updates + trainer._owed
    assert paid == 5 * (trainer.transitions - 60)
    assert lines[-1]["critic_loss"] > 0
    # Each transition is one chunk, discounted once, and a time limit ends it.
    stored = trainer.replay._data["discount"][: len(trainer.replay)]
    assert {round(float(x), 4) for x in stored} == {0.0, 0.99}
    rewards = trainer.replay._data["reward"][: len(trainer.replay)]
    assert {float(x) for x in rewards} <= {-2.0, -1.0, 0.0}
    assert int((stored == 0).sum()) == trainer.episodes
    # Critics of the noise see it scaled to the box; what was executed is of noise within the bound.
    kept = {key: value[: len(trainer.replay)] for key, value in trainer.replay._data.items()}
    u, state = kept["u"], kept["features"]
    assert u.abs().max() <= 1.0 and 1.5 * float(u.std()) == pytest.approx(0.76, abs=0.08)
    if name == "dsrl_na":
        executed = torch.tanh(1.2 * 1.5 * u * (1.0 + 0.3 * torch.sin(3.0 * state[:, :1])))
        assert torch.allclose(kept["chunk"].flatten(1).float(), executed, atol=1e-3)  # kept in half


def test_the_command_lines_budget_takes_the_place_of_a_files_or_a_robots_episodes(tmp_path):
    (tmp_path / "run.yaml").write_text("train: {episodes: 40}")
    for options in ([f"--config_path={tmp_path / 'run.yaml'}", *ENV], ["--robot.type=mujoco_arm"]):
        train = parse(AdaptConfig, "adapt", [*options, "--policy.path=base", "--train.env_steps=500"]).train
        assert (train.env_steps, train.episodes) == (500, None)
