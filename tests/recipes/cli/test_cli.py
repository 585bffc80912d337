"""The command line as a user meets it."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from trimtab.recipes.cli import main

TRIMTAB = str(Path(sys.executable).with_name("trimtab"))
POINT = "--env.type=metaworld_state"


def test_help_is_instant_and_imports_nothing_heavy():
    times = []
    for _ in range(3):
        started = time.perf_counter()
        done = subprocess.run([TRIMTAB, "--help"], capture_output=True, text=True, timeout=60)
        times.append(time.perf_counter() - started)
    assert done.returncode == 0 and "adapt" in done.stdout and done.stderr == ""
    assert min(times) < 1.0
    code = "import sys; from trimtab.recipes.cli import main; main(['--help']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip().endswith("False")


def test_a_reader_may_stop_early():
    """`trimtab recipes | head`."""
    listing = subprocess.Popen([TRIMTAB, "recipes"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    listing.stdout.close()
    assert listing.stderr.read() == b"" and listing.wait(60) == 0


def test_command_help(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["adapt", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for option in ("--policy.path", "--env.type", "--train.env_steps", "--noise.type", "--output_dir"):
        assert option in text


ERRORS = {
    "no such command": (["frobnicate"], "no command 'frobnicate'"),
    "no environment": (["adapt"], "--env.type: name the environment"),
    "a dataset without its name": (["lora", "--dataset.root=x"], "--dataset.repo_id: this option"),
    "unknown environment": (["eval", "--env.type=moon"], "--env.type: invalid choice: 'moon'"),
    "unknown option": (["adapt", POINT, "--polcy.path=x"], "--polcy.path: no such option"),
    "unknown algorithm": (["adapt", POINT, "--rl.type=magic"], "--rl.type: invalid choice: 'magic'"),
    "unknown noise space": (["adapt", POINT, "--noise.type=pink"], "--noise.type: invalid choice: 'pink'"),
    "not a number": (["adapt", POINT, "--seed=abc"], "--seed: "),
    "negative seed": (["adapt", POINT, "--seed=-1"], "--seed: must be between 0 and 20000"),
    "no steps": (["adapt", POINT, "--train.env_steps=0"], "--train.env_steps: must be at least 1"),
    "no environments": (["adapt", POINT, "--num_envs=0"], "--num_envs: must be at least 1"),
    "unknown reward": (["adapt", POINT, "--train.reward=gold"], "--train.reward: 'gold' is none of"),
    "bound of zero": (["adapt", POINT, "--noise.bound=0", "--noise.type=full"], "--noise.bound: the bound"),
    "no knots": (["adapt", POINT, "--noise.type=knots", "--noise.knots=0"], "error: --noise.knots: must be"),
    "knots elsewhere": (
        ["adapt", POINT, "--noise.type=full", "--noise.knots=4"],
        "--noise.knots: no such option of --noise.type=full",
    ),
    "base 60": (
        ["adapt", POINT, "--noise.type=masked", "--noise.rows=1:8"],
        "error: --noise.rows: '68' is no",
    ),
    "half a delta": (
        ["adapt", POINT, "--noise.type=residual", "--noise.delta=x"],
        "error: --noise.delta: 'x'",
    ),
    "no threads": (["eval", POINT, "--machine.threads=0"], "--machine.threads: must be at least 1"),
    "no episodes": (["eval", POINT, "--eval.n_episodes=0"], "--eval.n_episodes: must be at least 1"),
    "no policy": (["adapt", POINT], "--policy.path: name the folder"),
    "missing policy": (["adapt", POINT, "--policy.path=./nowhere"], "--policy.path: there is no folder"),
    "missing config file": (["adapt", "--config_path=no.yaml"], "--config_path: there is no file no.yaml"),
    "gamma of one": (
        ["adapt", POINT, "--rl.type=dsrl_sac", "--rl.gamma=1"],
        "--rl.gamma: must be at",
    ),
    "endless bound": (["adapt", POINT, "--noise.type=full", "--noise.bound=inf"], "--noise.bound: the bound"),
    "negative workers": (["eval", POINT, "--machine.workers=-1"], "--machine.workers: cannot be negative"),
    "selection seeds": (["eval", POINT, "--eval.seed=1999990"], "--eval.seed: 2000000 to 2000020 are the"),
    "episode too long": (
        ["eval", POINT, "--env.episode_length=501"],
        "--env.episode_length: must be",
    ),
    "missing plugin": (
        ["eval", POINT, "--env.discover_packages_path=no_such"],
        "--env.discover_packages_path",
    ),
    "output under a file": (["eval", POINT, "--output_dir=/etc/hostname/x"], "is a file, not a folder"),
    "seed of the demo": (["demo", "--seed=-1"], "--seed: must be between 0 and"),
    "unknown task of the demo": (["demo", "--task=hamer"], "--task: Meta-World has no task 'hamer'"),
    "task outside the base": (["demo", "--task=push"], "--task: push-v3 is not among --base.tasks"),
    "unknown task of a base": (["base", "--tasks=a,b"], "--tasks: Meta-World has no task 'a'"),
}


def check_error(argv, message, capsys, tmp_path):
    assert main(argv) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.strip()]
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("trimtab") and "error: " in lines[0]
    assert message in lines[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ERRORS)
def test_bad_input_is_one_line_and_exit_code_2(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv, message = ERRORS[name]
    check_error(argv, message, capsys, tmp_path)


def test_errors_about_a_real_policy(tiny_base, pusht_policy, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = f"--policy.path={tiny_base}"
    task = "--env.task=drawer-close-v3"
    cases = [
        (["adapt", POINT, base, "--env.task=hamer"], "--env.task: Meta-World has no task 'hamer'"),
        (["eval", POINT, base, "--env.task=hammer-v3"], "this base was not trained on hammer-v3"),
        (["adapt", POINT, f"--policy.path={pusht_policy}", task, "--machine.workers=0"], "observation.state"),
        (["eval", POINT, base, "--env.task=drawer-close,button-press-topdown"], "several tasks at once"),
        (["adapt", POINT, base, task, "--policy.device=warp"], "--policy.device: 'warp' is not usable"),
        (["eval", "--env.type=pusht", base, "--machine.workers=0"], "--env.type: the policy needs"),
    ]
    for argv, message in cases:
        check_error(argv, message, capsys, tmp_path)


def test_output_folder_in_use(capsys, tmp_path):
    (tmp_path / "keep.txt").write_text("mine")
    assert main(["eval", POINT, "--policy.path=x/y", f"--output_dir={tmp_path}"]) == 2
    assert "--output_dir: " in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["keep.txt"]


def test_broken_config_file(capsys, tmp_path):
    for name, text in (
        ("broken.yaml", "env: [\n"),
        ("unknown.yaml", "env: {type: metaworld_state}\nsped: 3\n"),
        ("typed.yaml", "env: {type: metaworld_state}\nseed: many\n"),
    ):
        path = tmp_path / name
        path.write_text(text)
        assert main(["adapt", f"--config_path={path}"]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1, lines


def test_list_tasks(capsys):
    assert main(["base", "--list_tasks=true"]) == 0
    assert len(capsys.readouterr().out.split()) == 50
