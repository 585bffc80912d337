"""`trimtab adapt --resume=true` as a user meets it, on a run over two tasks."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from filelock import FileLock

from trimtab.recipes.cli import main
from trimtab.rl.trainer import Trainer

TASKS = ["drawer-close-v3", "button-press-topdown-v3"]
SMALL = [
    *("--env.type=metaworld_state", f"--env.task={','.join(TASKS)}", "--env.episode_length=16"),
    *("--train.env_steps=160", "--train.warmup_transitions=8", "--train.first_update=8"),
    *("--train.log_every=40", "--train.replay_capacity=500", "--checkpoint.every=50"),
    *("--rl.type=dsrl_sac", "--rl.batch_size=8", "--num_envs=2", "--machine.workers=0"),
    *("--eval.n_episodes=2", "--eval.batch_size=2", "--eval.constant_candidates=0", "--eval.videos=0"),
    "--policy.device=cpu",
]


def lines(folder):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("seconds")} for line in found]


def results(folder):
    found = json.loads((folder / "results.json").read_text())
    return {k: v for k, v in found.items() if k != "seconds"}


@pytest.fixture(scope="module")
def runs(tiny_base, tmp_path_factory):
    """A run that was not stopped, one that SIGTERM stopped, and what the latter said."""
    root = tmp_path_factory.mktemp("runs")
    argv = ["adapt", f"--policy.path={tiny_base}", *SMALL]
    assert main([*argv, f"--output_dir={root / 'whole'}"]) == 0
    learn = Trainer._learn

    def pre_empted(trainer):
        if trainer.env_steps > 90 and not trainer.stop():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
        learn(trainer)

    Trainer._learn = pre_empted
    try:
        assert main([*argv, f"--output_dir={root / 'cut'}"]) == 0
    finally:
        Trainer._learn = learn
    return root / "whole", root / "cut"


def test_several_tasks_are_told_apart(runs):
    found = results(runs[0])
    assert list(found["tasks"]) == TASKS
    for name, entry in found["policies"].items():
        each = [found["tasks"][task][name] for task in TASKS]
        assert entry["episodes"] == sum(one["episodes"] for one in each) == 4
        assert entry["successes"] == sum(one["successes"] for one in each)
    assert all(f"success_rate/{task}" in line for line in lines(runs[0]) for task in TASKS)


def test_refusals_name_the_difference(runs, capsys):
    cut = runs[1]
    names = sorted(path.name for path in cut.rglob("*"))
    assert not (cut / "results.json").exists() and (cut / "checkpoints" / "last").exists()
    go_on = ["adapt", "--resume=true", f"--output_dir={cut}"]
    for option, message in (
        ("--rl.gamma=0.9", "--rl.gamma: "),
        ("--num_envs=3", "belongs to a run with 2, not 3"),
        ("--env.task=drawer-close-v3", "--env.task: "),
    ):
        assert main([*go_on, option]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
        assert message in line
    (manifest, *_) = sorted((cut / "checkpoints").glob("[0-9]*/manifest.json"), reverse=True)
    content = manifest.read_text()
    other = json.loads(content)
    other["belongs"]["base"]["sha256"] = "0" * 64
    manifest.write_text(json.dumps(other))
    try:
        assert main(go_on) == 2
        assert "belongs to another base policy (sha256 differ)" in capsys.readouterr().err
    finally:
        manifest.write_text(content)
    assert sorted(path.name for path in cut.rglob("*")) == names


def test_no_two_runs_in_one_folder_and_none_shorter_than_it_is(runs, capsys):
    cut = runs[1]
    go_on = ["adapt", "--resume=true", f"--output_dir={cut}"]
    kept = (cut / "config.json").read_text()
    with FileLock(cut / ".lock"):
        code = "import sys; from trimtab.recipes.cli import main; sys.exit(main(sys.argv[1:]))"
        other = subprocess.run([sys.executable, "-c", code, *go_on], capture_output=True, text=True)
    assert other.returncode == 2 and f"--output_dir: another process runs in {cut}" in other.stderr
    assert main([*go_on, "--train.env_steps=60"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert "--train.env_steps: " in line and " has spent " in line
    assert (cut / "config.json").read_text() == kept


def test_a_resumed_command_ends_as_the_one_that_was_not_stopped(runs, capsys):
    whole, cut = runs
    assert lines(cut) != lines(whole)
    config = cut / "checkpoints" / "last" / "config.json"
    assert main(["adapt", "--resume=true", f"--config_path={config}"]) == 0
    said = capsys.readouterr().out
    assert "going on from" in said
    assert lines(cut) == lines(whole)
    assert results(cut) == results(whole)
    assert (cut / "artefact" / "config.json").is_file() and (cut / "curve.png").is_file()
