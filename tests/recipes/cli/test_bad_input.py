"""Malformed input of every kind: one line on stderr that names the option, exit code 2, nothing written."""

import json
import shutil

import pytest

from trimtab.recipes.cli import main

ENV = "--env.type=metaworld_state"
SAC, NA, BEST = "--rl.type=dsrl_sac", "--rl.type=dsrl_na", "--rl.type=best_of_n"

# Options: (arguments after `adapt --env.type=metaworld_state`, what the line must hold).
OPTIONS = {
    "text for a number": (["--num_envs=many"], "--num_envs"),
    "half an environment": (["--num_envs=1.5"], "--num_envs"),
    "no environments": (["--num_envs=0"], "--num_envs: must be at least 1"),
    "seed too large": (["--seed=20001"], "--seed: must be between"),
    "truth is not maybe": (["--resume=maybe"], "--resume"),
    "negative checkpoints": (["--checkpoint.every=-1"], "--checkpoint.every: cannot be negative"),
    "keep none": (["--checkpoint.keep=0"], "--checkpoint.keep: must be at least 1"),
    "checkpoint option misspelt": (["--checkpoint.evry=5"], "--checkpoint.evry: no such option"),
    "negative faults": (["--faults.limit=-1"], "--faults.limit: cannot be negative"),
    "negative patience": (["--faults.timeout=-1"], "--faults.timeout: cannot be negative"),
    "patience of nan": (["--faults.timeout=nan"], "--faults.timeout: cannot be negative"),
    "unknown tracker": (["--trackers=abacus"], "--trackers: 'abacus' is none of"),
    "no steps": (["--train.env_steps=0"], "--train.env_steps: must be at least 1"),
    "steps below zero": (["--train.env_steps=-5"], "--train.env_steps: must be at least 1"),
    "no logging": (["--train.log_every=0"], "--train.log_every: must be at least 1"),
    "no first update": (["--train.first_update=0"], "--train.first_update: must be at least 1"),
    "small replay": (["--train.replay_capacity=10"], "--train.replay_capacity: cannot be below"),
    "no updates": (["--train.updates_per_transition=0"], "--train.updates_per_transition: must be positive"),
    "updates of nan": (["--train.updates_per_transition=nan"], "--train.updates_per_transition"),
    "endless restart": (["--train.restart=.inf"], "--train.restart: must be finite"),
    "negative restart": (["--train.restart=-1"], "--train.restart: cannot be negative"),
    "negative warm-up": (["--train.warmup_transitions=-1"], "--train.warmup_transitions: cannot be"),
    "unknown reward": (["--train.reward=gold"], "--train.reward: 'gold' is none of"),
    "a range without rewards": (
        ["--train.reward_range=[0, 1]"],
        "--train.reward_range: is of --train.reward=env; leave it out",
    ),
    "a range upside down": (
        ["--train.reward=env", "--train.reward_range=[1, 0]"],
        "--train.reward_range: must be two numbers, the smaller first, got 1.0, 0.0",
    ),
    "clip at zero": (["--train.clip_norm=0"], "--train.clip_norm: must be positive"),
    "gate without least": (["--train.gate.least=0"], "--train.gate.least: is a share"),
    "gate without window": (["--train.gate.window=0"], "--train.gate.window: must be at least 1"),
    "doubt below zero": (["--train.gate.doubt=-1"], "--train.gate.doubt: cannot be negative"),
    "gamma of one": ([SAC, "--rl.gamma=1"], "--rl.gamma: must be at least 0 and below 1"),
    "gamma of nan": ([SAC, "--rl.gamma=nan"], "--rl.gamma: must be"),
    "no n-step": ([SAC, "--rl.n_step=0"], "--rl.n_step: must be positive"),
    "empty batch": ([SAC, "--rl.batch_size=0"], "--rl.batch_size: must be positive"),
    "rate below zero": ([SAC, "--rl.learning_rate=-1"], "--rl.learning_rate: must be positive"),
    "rate without end": ([SAC, "--rl.learning_rate=inf"], "--rl.learning_rate: must be positive"),
    "rate that rises": ([BEST, "--rl.learning_rate_end=2"], "--rl.learning_rate_end: is a share"),
    "tau above one": ([SAC, "--rl.tau=2"], "--rl.tau: is a share"),
    "unknown discount": ([SAC, "--rl.discount_per=day"], "--rl.discount_per: 'day' is none of"),
    "unknown activation": ([SAC, "--rl.actor.activation=step"], "activation: 'step' is none of"),
    "no layers": ([SAC, "--rl.critic.layers=0"], "--rl.critic"),
    "unknown mode": ([NA, "--rl.mode=guess"], "--rl.mode: 'guess' is none of"),
    "unknown bootstrap": ([NA, "--rl.bootstrap=boots"], "--rl.bootstrap: 'boots' is none of"),
    "more pairs than candidates": ([NA, "--rl.num_candidates=2", "--rl.distilled_pairs=3"], "distilled"),
    "unknown target": ([BEST, "--rl.target=mean"], "--rl.target: 'mean' is none of"),
    "unknown loss": ([BEST, "--rl.critic_loss=huber"], "--rl.critic_loss: 'huber' is none of"),
    "soft values are no returns": (
        [SAC, "--rl.critic_loss=logistic", "--rl.backup_entropy=true"],
        "--rl.critic_loss: logistic needs",
    ),
    "an option of another algorithm": ([SAC, "--rl.num_candidates=4"], "--rl"),
    "unknown algorithm": (["--rl.type=magic"], "--rl.type: invalid choice"),
    "an option whose group has no type": (["--rl.batch_size=8"], "--rl.batch_size: which options"),
    "a bound on no noise": (["--noise.bound=1"], "depends on --noise.type; name"),
    "unknown noise": (["--noise.type=pink"], "--noise.type: invalid choice"),
    "bound below zero": (["--noise.type=full", "--noise.bound=-1"], "--noise.bound: the bound must be"),
    "unknown preset": (["--rl.preset=secret"], "--rl.preset: 'secret' is none of"),
    "no episodes": (["--eval.n_episodes=0"], "--eval.n_episodes: must be at least 1"),
    "negative videos": (["--eval.videos=-1"], "--eval.videos: cannot be negative"),
    "seeds of training": (["--eval.seed=60000000"], "--eval.seed: stay below"),
    "no threads": (["--machine.threads=0"], "--machine.threads: must be at least 1"),
    "negative workers": (["--machine.workers=-2"], "--machine.workers: cannot be negative"),
    "endless episodes": (["--env.episode_length=501"], "--env.episode_length: must be between"),
    "unknown option": (["--plicy.path=x"], "--plicy.path: no such option"),
    "an option without its dashes": (["seed=3"], "seed: no such option"),
    "no policy": ([], "--policy.path: name the folder"),
    "a policy that is not there": (["--policy.path=./nowhere"], "--policy.path: there is no folder"),
    "resume of nothing": (["--resume=true"], "--resume: name the run to go on with"),
}  # fmt: skip

# Files given as --config_path: (content, what the line must hold).
FILES = {
    "no yaml": ("env: [\n", "--config_path"),
    "binary": (b"\xff\xfe\x00\x81", "--config_path"),
    "empty": ("", "--config_path=recipe.yaml: holds no options"),
    "a list": ("- env\n- rl\n", "--config_path=recipe.yaml: holds no options"),
    "unknown field": ("env: {type: metaworld_state}\nsped: 3\n", "sped"),
    "unknown nested field": ("env: {type: metaworld_state}\ntrain: {steps: 3}\n", "steps"),
    "text for a number": ("env: {type: metaworld_state}\nseed: many\n", "seed"),
    "a list for a number": ("env: {type: metaworld_state}\nnum_envs: [1, 2]\n", "num_envs"),
    "no environment": ("seed: 3\n", "--env.type"),
    "value out of range": ("env: {type: metaworld_state}\ntrain: {env_steps: 0}\n", "--train.env_steps"),
}


def check(argv, message, capsys, folder):
    before = sorted(folder.rglob("*"))
    assert main(argv) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert len(lines) == 1, lines
    assert lines[0].startswith("trimtab adapt: error: ") and message in lines[0], lines[0]
    assert sorted(folder.rglob("*")) == before, "nothing is written"


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options, message = OPTIONS[name]
    check(["adapt", ENV, *options], message, capsys, tmp_path)


@pytest.mark.parametrize("name", FILES)
def test_config_files(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, message = FILES[name]
    (tmp_path / "recipe.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    check(["adapt", "--config_path=recipe.yaml"], message, capsys, tmp_path)


def damage(name):
    """A change to a policy's folder."""
    changes = {
        "no config": lambda f: (f / "config.json").unlink(),
        "broken config": lambda f: (f / "config.json").write_text("{"),
        "config of nothing": lambda f: (f / "config.json").write_text("{}"),
        "config of an unknown type": lambda f: (f / "config.json").write_text('{"type": "oracle"}'),
        "no weights": lambda f: (f / "model.safetensors").unlink(),
        "truncated weights": lambda f: (f / "model.safetensors").write_bytes(
            (f / "model.safetensors").read_bytes()[:1000]
        ),
        "a tensor of another shape": reshape,
        "no processor": lambda f: (f / "policy_preprocessor.json").unlink(),
    }
    return changes[name]


def reshape(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    name = next(name for name, value in tensors.items() if value.ndim >= 2)
    tensors[name] = tensors[name][:1].clone()
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    "name",
    [
        *("no config", "broken config", "config of nothing", "config of an unknown type", "no weights"),
        *("truncated weights", "a tensor of another shape", "no processor"),
    ],
)
def test_policy_folders(name, pusht_policy, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    damage(name)(shutil.copytree(pusht_policy, tmp_path / "policy"))
    argv = ["adapt", ENV, "--policy.path=policy", "--policy.device=cpu", "--machine.workers=0"]
    check(argv, "--policy.path", capsys, tmp_path)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda f: None, "holds no run to go on with"),
        (lambda f: (f / "notes.txt").write_text("mine"), "holds no run to go on with"),
        (lambda f: (f / "config.json").write_text("{"), "--config_path"),
        (lambda f: (f / "config.json").write_text(json.dumps({"seed": 1})), "--env.type"),
        (lambda f: (f / "config.json").write_text('{"env": {"type": "metaworld_state"}}'), "--policy.path"),
    ],
)
def test_runs_to_go_on_with(make, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    make(tmp_path / "run")
    check(["adapt", "--resume=true", "--output_dir=run"], message, capsys, tmp_path)


def test_there_are_enough_of_them():
    assert len(OPTIONS) + len(FILES) + 8 + 5 >= 60
