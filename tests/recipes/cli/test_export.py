"""`trimtab export`, and what it wrote under the real `lerobot-eval` command."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import draccus
import pytest
import torch
from lerobot.envs.configs import EnvConfig
from lerobot.policies.factory import get_policy_class, make_pre_post_processors

import lerobot_policy_trimtab  # noqa: F401 - what LeRobot's commands import
from tests.helpers import lerobot_commands
from tests.helpers.steered import assert_no_pickle
from trimtab.adapters import PolicyConfig, load_adapter
from trimtab.policies.actor import ActorConfig, NoiseActor
from trimtab.policies.artefact import load_artefact, read_config, save_artefact
from trimtab.policies.noise_samplers import prior_noise
from trimtab.policies.noise_space import FullNoiseConfig
from trimtab.recipes.cli import main
from trimtab.recipes.cli.eval import EvaluateConfig, SteeredEvalConfig, acting
from trimtab.recipes.cli.export import environment_options, push
from trimtab.recipes.support.options import parse
from trimtab.recipes.support.session import Session
from trimtab.recipes.support.shared_configs import MachineConfig
from trimtab.rl.envs.gym import GymConfig
from trimtab.rl.envs.metaworld import MetaworldStateConfig

ENV = ["--env.type=metaworld_state", "--env.task=drawer-close-v3", "--env.episode_length=90"]
MACHINE = ["--policy.device=cpu", "--machine.workers=0", "--machine.threads=1"]
EPISODES = 4


@pytest.fixture(scope="module")
def run(drawer_base, tmp_path_factory):
    """A short best-of-n run with edits on a base that solves some episodes, and its export."""
    root = tmp_path_factory.mktemp("export")
    shutil.copytree(drawer_base, root / "base")
    argv = [
        "adapt", f"--policy.path={root / 'base'}", *ENV, *MACHINE, "--train.env_steps=200",
        "--train.warmup_transitions=8",
        "--train.first_update=8", "--rl.type=best_of_n", "--rl.num_candidates=4", "--rl.target_candidates=2",
        "--rl.batch_size=8", "--num_envs=2", f"--eval.n_episodes={EPISODES}", f"--eval.batch_size={EPISODES}",
        "--rl.edit.scale=0.1", "--eval.constant_candidates=0", "--eval.videos=0",
        f"--output_dir={root / 'run'}",
    ]  # fmt: skip
    assert main(argv) == 0
    out = root / "exported"
    assert main(["export", f"--run={root / 'run'}", f"--output_dir={out}", "--policy.device=cpu"]) == 0
    return root, out


def arguments(policy, output, *more):
    return [
        "lerobot-eval", f"--policy.path={policy}", f"--eval.n_episodes={EPISODES}",
        f"--eval.batch_size={EPISODES}", "--eval.use_async_envs=false", "--seed=1000000",
        f"--output_dir={output}", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def process(run):
    """The command of LeRobot, on its own, while the tests go on."""
    name, *more = arguments(run[1], run[0] / "theirs", *ENV)
    environment = {**os.environ, "MUJOCO_GL": "egl", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [str(Path(sys.executable).with_name(name)), *more],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    yield process
    process.kill()
    process.wait()


def metrics(output):
    return json.loads((output / "eval_info.json").read_text())["per_task"][0]["metrics"]


def trimtab_eval(policy, output, *more):
    argv = ["eval", f"--policy.path={policy}", *ENV, *MACHINE, f"--eval.n_episodes={EPISODES}"]
    argv += ["--eval.constant_candidates=0", "--eval.videos=0", f"--output_dir={output}", *more]
    assert main(argv) == 0
    return json.loads((output / "results.json").read_text())


def test_without_the_actor_lerobot_eval_gets_what_it_gets_of_the_base(
    pusht_policy, tmp_path, monkeypatch, process
):
    """Reward by reward, where every step has one; and the actor changes them. The command's own function, in
    this process: it imports for longer than it runs.
    """
    from lerobot.scripts.lerobot_eval import main as lerobot_eval

    adapter, noise = load_adapter(PolicyConfig(path=str(pusht_policy), device="cpu")), FullNoiseConfig()
    width = adapter.features(adapter.example_conditioning(1, torch.Generator())).shape[-1]
    actor = NoiseActor(width, noise.build(adapter.noise_spec), ActorConfig(hidden=8, layers=1))
    torch.nn.init.constant_(actor.net[-1].bias[: actor.space.dim], 1.5)
    options, out = PolicyConfig(path=str(pusht_policy)), tmp_path / "artefact"
    save_artefact(out, actor, noise, adapter, options, pusht_policy, {})
    env = ["--env.type=pusht", "--env.obs_type=environment_state_agent_pos", "--env.episode_length=12"]
    rewards = {}
    for name, argv in (
        ("plain", arguments(out, tmp_path / "plain", *env, "--policy.use_actor=false")),
        ("base", arguments(pusht_policy, tmp_path / "base", *env, "--policy.device=cpu")),
        ("steered", arguments(out, tmp_path / "steered", *env)),
    ):
        lerobot_commands.run(lerobot_eval, argv[1:], monkeypatch)
        rewards[name] = metrics(tmp_path / name)["sum_rewards"]
    assert rewards["plain"] == rewards["base"]
    assert rewards["steered"] != rewards["base"] and len(set(rewards["base"])) > 1


def test_lerobot_eval_gets_what_trimtab_eval_gets(run, process, tmp_path):
    """The same episodes, with no flag of ours. They start alike and the actor's mean is no draw; a rounding
    difference between batches of other sizes may decide one of them.
    """
    root, out = run
    ours = trimtab_eval(out, tmp_path / "ours")["policies"]["steered"]
    _, error = process.communicate(timeout=400)
    if process.returncode and "gladLoadGL" in error:
        pytest.skip("lerobot-eval renders, and this machine cannot")
    assert process.returncode == 0, error[-2000:]
    theirs = sum(metrics(root / "theirs")["successes"])
    low, high = ours["ci95"]
    assert low <= theirs / EPISODES <= high and abs(theirs - ours["successes"]) <= 1
    assert ours["successes"] + theirs > 0, "some episodes succeed"


def test_eval_of_an_artefact_executes_the_candidate_of_the_best_value(run, tmp_path, capsys):
    """As the artefact says, or the command line: the actor, draws of the base, edits, the critic's choice."""
    root, out = run
    copy = shutil.copytree(out, root / "selecting")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"num_candidates": 3, "deterministic": False}))
    said = trimtab_eval(copy, tmp_path / "as_said", "--env.episode_length=20")["steered_by"]
    assert said == {"deterministic": False, "num_candidates": 3, "use_edit": True}
    steered = load_artefact(PolicyConfig(path=str(copy), device="cpu"))
    env = MetaworldStateConfig(task="drawer-close-v3", episode_length=8)
    eval_config = SteeredEvalConfig(num_candidates=5, deterministic=True, use_edit=True)
    session = Session(steered.adapter, env, eval_config, MachineConfig(workers=0))
    policy, runner = acting(session, steered), session.runner
    conditioning = steered.adapter.example_conditioning(6, torch.Generator().manual_seed(0))
    features = runner.features(conditioning)
    generators = [torch.Generator().manual_seed(row) for row in range(6)]
    prior = torch.stack([runner.prior(policy.draws, generator) for generator in generators])
    assert prior.shape[:2] == (6, 5)
    actions, chosen = runner.act(policy, conditioning, features, prior)[1], set()
    for row in range(6):
        own = steered.actor.act(features[row : row + 1], prior[row, -1:], True)
        noises = torch.cat([prior_noise(steered.actor.space)(None, prior[row, :-1]), own])
        made = runner.denoise(conditioning[row], noises.unsqueeze(0))
        chunks = torch.cat([made, steered.edit.correct(features[row : row + 1], made)], 1)[0]
        with torch.no_grad():
            values = steered.critic(features[row].expand(10, -1), chunks.flatten(1)).mean(0)
        chosen.add(int(values.argmax()))
        expected = session.runner.executable(chunks[values.argmax()].unsqueeze(0), conditioning[row])
        assert abs(actions[row] - expected[0]).max() <= 1e-5
    assert len(chosen) > 1 and max(chosen) > 4
    argv = ["eval", f"--policy.path={root / 'base'}", *ENV, *MACHINE, "--eval.num_candidates=4"]
    assert main([*argv, f"--output_dir={tmp_path / 'x'}"]) == 2
    assert "--eval.num_candidates: needs the artefact of a best_of_n run" in capsys.readouterr().err
    argv[-1] = "--eval.use_edit=true"
    assert main([*argv, f"--output_dir={tmp_path / 'x'}"]) == 2
    assert "--eval.use_edit: needs the artefact of a run with --rl.edit.scale" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_golden_ticket_is_exported_too(run):
    root, _ = run
    argv = ["adapt", f"--policy.path={root / 'base'}", *ENV[:2], "--env.episode_length=20", *MACHINE]
    argv += ["--rl.type=golden_ticket", "--rl.candidates=3", "--rl.budget=8", "--num_envs=2"]
    argv += ["--eval.n_episodes=2", "--eval.batch_size=2", "--eval.constant_candidates=0", "--eval.videos=0"]
    assert main([*argv, f"--output_dir={root / 'ticket'}"]) == 0
    out = root / "ticket_exported"
    assert main(["export", f"--run={root / 'ticket'}", f"--output_dir={out}", "--policy.device=cpu"]) == 0
    assert "golden_ticket" in (out / "README.md").read_text()
    policy = get_policy_class("trimtab").from_pretrained(out)
    ticket = policy.actor.act(torch.zeros(1, 0), torch.zeros(1, *policy.config.noise_shape), True)
    before, _ = make_pre_post_processors(policy.config, pretrained_path=str(out))
    raw = policy.adapter.example_observation(2, torch.Generator().manual_seed(0))
    batch = before({k: v[:, -1] if torch.is_tensor(v) else v for k, v in raw.items()})
    timed = {k: v.unsqueeze(1) for k, v in batch.items() if k.startswith("observation")}
    expected = policy.adapter.denoise(policy.adapter.encode(timed), ticket.expand(2, -1, -1))
    assert (policy.predict_action_chunk(batch) - expected).abs().max() <= 1e-6


def test_an_export_is_complete_small_and_its_card_shows_the_measured_success(run):
    root, out = run
    names = {file.name for file in out.iterdir()}
    assert {
        "README.md",
        "adapt.json",
        "config.json",
        "model.safetensors",
        "critic.safetensors",
        "edit.safetensors",
    } <= names
    assert {"policy_preprocessor.json", "policy_postprocessor.json"} <= names
    assert sum(file.stat().st_size for file in out.iterdir()) < 5e6
    assert_no_pickle(out)
    card = (out / "README.md").read_text()
    results = json.loads((root / "run" / "results.json").read_text())
    for entry in (results["policies"]["base"], results["policies"]["steered"]):
        assert f"{entry['successes']}/{EPISODES}  " in card
        assert f"{100 * entry['ci95'][0]:.1f} - {100 * entry['ci95'][1]:.1f} %" in card
    assert f"{results['env_steps']:,} environment steps in {results['training_episodes']:,} episodes" in card
    assert results["base_sha256"] in card and "drawer-close-v3" in card and "best_of_n" in card
    assert "by the best of 4 chunks" in card and "changed by up to 0.1 in normalised actions" in card
    assert str(root) not in card, "no path of this machine"
    assert read_config(out).base.path == "../base"
    again = json.loads((out / "adapt.json").read_text())
    assert again["env"]["task"] == "drawer-close-v3"


def test_the_cards_command_says_all_of_the_environment_that_is_not_by_default(run):
    _, out = run
    (command,) = re.findall(r"lerobot-eval [^`]*", (out / "README.md").read_text())
    assert "--env.episode_length=90" in command and "--env.task=drawer-close-v3" in command
    env = GymConfig(factory="my_sim:make", kwargs={"hard": False}, success="info.won", episode_length=9)
    options = environment_options(draccus.encode(env, EnvConfig))
    assert options == {
        **{"env.type": "gym", "env.factory": "my_sim:make", "env.kwargs": '{"hard": false}'},
        **{"env.success": "info.won", "env.episode_length": "9"},
    }
    given = [f"--{name}={value}" for name, value in options.items()]
    assert parse(EvaluateConfig, "eval", ["--policy.path=x", *given]).env == env
    assert environment_options({"type": "unheard of", "task": "x"}) == {
        **{"env.type": "unheard of", "env.task": "x"}
    }


def test_nothing_else_in_the_folder_is_lost(run, tmp_path, capsys):
    root, out = run
    copy = shutil.copytree(out, root / "cloned")
    (copy / "videos").mkdir()
    argv = ["export", f"--run={root / 'run'}", f"--output_dir={copy}", "--policy.device=cpu"]
    assert main(argv) == 2
    assert "also holds videos, which would be lost; name another" in capsys.readouterr().err
    (copy / "videos").rmdir()
    assert main(argv) == 0


def test_a_policy_that_is_saved_elsewhere_finds_its_base(run, tmp_path):
    _, out = run
    policy = get_policy_class("trimtab").from_pretrained(out)
    policy.save_pretrained(tmp_path / "deep" / "er" / "again")
    again = get_policy_class("trimtab").from_pretrained(tmp_path / "deep" / "er" / "again")
    assert again.steered.base_folder == policy.steered.base_folder
    assert policy.config.base.path == "../base", "the loaded one stays as it is"


def test_an_export_moved_with_its_base_can_be_exported_again(run, tmp_path, capsys):
    root, out = run
    shutil.copytree(out, tmp_path / "there" / "policy")
    shutil.copytree(root / "base", tmp_path / "there" / "base")
    argv = ["export", f"--run={tmp_path / 'there' / 'policy'}", f"--output_dir={tmp_path / 'b' / 'c'}"]
    assert main(argv) == 0
    config = read_config(tmp_path / "b" / "c")
    assert config.base.path == "../../there/base" and config.deterministic
    assert (tmp_path / "b" / "c" / "critic.safetensors").is_file()
    shutil.move(tmp_path / "there" / "base", tmp_path / "elsewhere")
    assert main([*argv[:2], f"--output_dir={tmp_path / 'd'}"]) == 2
    assert "is not where it was" in capsys.readouterr().err
    other = [f"--policy.path={tmp_path / 'elsewhere'}", "--policy.revision=v2"]
    assert main([*argv[:2], f"--output_dir={tmp_path / 'd'}", *other]) == 0
    base = read_config(tmp_path / "d").base
    assert (base.path, base.revision) == ("../elsewhere", "v2")
    again = json.loads((tmp_path / "d" / "adapt.json").read_text())
    assert (
        again["policy"]["path"] == str(tmp_path / "elsewhere") and again["env"]["task"] == "drawer-close-v3"
    )


def test_an_export_keeps_whether_the_actor_samples(run, tmp_path):
    root, out = run
    shutil.copytree(root / "base", tmp_path / "base")
    copy = shutil.copytree(out, tmp_path / "policy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"deterministic": False}))
    assert main(["export", f"--run={copy}", f"--output_dir={tmp_path / 'again'}"]) == 0
    assert not read_config(tmp_path / "again").deterministic


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "--run: name the folder"),
        (["--run={tmp}"], "holds no artefact"),
        (["--run={run}", "--output_dir={base}"], "exists and is no artefact"),
        (["--run={run}", "--output_dir={run}/artefact"], "is the artefact itself"),
        (
            ["--run={run}", "--output_dir={tmp}/x", "--push_to_hub=a/b"],
            "is a local folder, which nobody else has",
        ),
        (["--run={run}", "--output_dir={tmp}/x", "--policy.path=nobody/nothing"], "is not where it was"),
        (["--run={run}", "--robot.type=so101_follower"], "--robot.type: no such option"),
    ],
)
def test_what_cannot_be_exported_is_refused_in_one_line_and_nothing_is_written(
    run, tmp_path, capsys, argv, message
):
    root, _ = run
    names = {"tmp": tmp_path, "run": root / "run", "base": root / "base"}
    assert main(["export", *(option.format(**names) for option in argv)]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error
    assert not (tmp_path / "x").exists()


def test_a_hub_out_of_reach_is_a_one_line_error(run, monkeypatch):
    from trimtab.adapters import UserError

    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="--push_to_hub: a/b cannot be written"):
        push(run[1], "a/b", False)
