"""The commands on the embedded arm, with the station process that they start, and a script for a person."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.helpers.robots import PERSON, command, make_policy
from trimtab.recipes.cli import main
from trimtab.recipes.embedded_arm import MujocoArm
from trimtab.rl.envs.robot.episodes import EpisodeRecord, episode_folders

ARM = [
    "--robot.type=mujoco_arm",
    "--robot.clock=step",
    "--robot.id=child",
    f"--robot.person={PERSON}",
    "--robot.episode_time_s=1",
    "--robot.move_s=0.1",
    "--robot.park_after_s=0.2",
    "--machine.threads=1",
]
RUN = [
    *(
        "--rl.num_candidates=4",
        "--rl.target_candidates=4",
        "--rl.batch_size=16",
        "--rl.type=best_of_n",
        "--rl.edit.scale=0.1",
    ),
    *("--train.first_update=4", "--train.updates_per_transition=2", "--robot.base_episodes=1"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_policy(tmp_path_factory.mktemp("robot") / "base")


def killed_after(episodes, output, command):
    """Run a command until there are so many episodes, kill it, and wait for its station to end."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    until = time.monotonic() + 120
    while len(episode_folders(output / "episodes")) < episodes:
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    return process.communicate(timeout=60)[0]  # the station holds the pipe, too, until it has parked


def test_a_run_that_is_killed_keeps_its_episodes_and_goes_on(base, tmp_path, capfd):
    output, trimtab = tmp_path / "run", [sys.executable, "-m", "trimtab.recipes.cli"]
    options = [f"--policy.path={base}", *ARM, *RUN, "--robot.episodes=4", f"--output_dir={output}"]
    said = killed_after(2, output, [*trimtab, "adapt", *options])
    assert "the learner is gone" in said and "and parks" in said
    kept = [EpisodeRecord.read(folder) for folder in episode_folders(output / "episodes")]
    assert len(kept) >= 2
    command("adapt", "--resume=true", f"--output_dir={output}")
    saved = json.loads((output / "artefact" / "config.json").read_text())
    assert saved["num_candidates"] == 16  # on a robot the critic chooses, unless told otherwise
    results = json.loads((output / "results.json").read_text())
    assert sum(entry["episodes"] for entry in results["policies"].values()) == 4
    assert len(episode_folders(output / "episodes")) == 4
    assert (
        main(
            [
                "adapt",
                f"--policy.path={base}",
                *RUN[:-1],
                f"--from_episodes={output / 'episodes'}",
                "--train.offline_updates=6",
                f"--output_dir={tmp_path / 'anew'}",
            ]
        )
        == 0
    )
    assert json.loads((tmp_path / "anew" / "results.json").read_text())["updates"] == 6
    steered = [
        f"--policy.path={output / 'artefact'}",
        "--eval.n_episodes=2",
        f"--output_dir={tmp_path / 'ev'}",
    ]
    command("eval", *steered, said={"script": {"1": {"6": "drop"}}})
    policies = json.loads((tmp_path / "ev" / "results.json").read_text())["policies"]
    assert [policies[name]["episodes"] for name in ("base", "steered")] == [2, 2]
    assert len(episode_folders(tmp_path / "ev" / "episodes")) == 5
    judged = json.loads((tmp_path / "ev" / "results.json").read_text())
    assert judged["steered_by"] == {"deterministic": True, "num_candidates": 16, "use_edit": True}
    assert main(["export", f"--run={output}"]) == 0
    card = (output / "export" / "README.md").read_text()
    assert "Episodes of the run itself" in card and "lerobot-eval" not in card
    assert "lerobot-rollout --policy.path=export --robot.type=... --fps=15" in card
    assert main(["eval", steered[0], *ARM, "--robot.fps=30", f"--output_dir={tmp_path / 'fast'}"]) == 2
    assert "--robot.fps: the artefact was steered with 15, not 30; name the same" in capfd.readouterr().err


def test_a_judge_who_stops_is_not_asked_again(base, tmp_path, capfd):
    options = [f"--policy.path={base}", "--eval.n_episodes=3", f"--output_dir={tmp_path / 'ev'}"]
    command("eval", *options, said={"script": {"1": {"6": "stop"}}})
    assert "episode 3:" not in capfd.readouterr().out
    assert json.loads((tmp_path / "ev" / "results.json").read_text())["policies"]["base"]["episodes"] == 1


def test_no_command_moves_the_arm_before_the_person_is_ready(base, tmp_path, monkeypatch):
    sent, send = [], MujocoArm.send_action
    monkeypatch.setattr(MujocoArm, "send_action", lambda arm, action: sent.append(1) or send(arm, action))
    output, never = tmp_path / "run", {"delay_s": 0.3, "script": {"0": {"-1": "stop"}}}
    resume = ("adapt", "--resume=true", f"--output_dir={output}")
    new = (f"--policy.path={base}", *RUN, "--robot.episodes=2", f"--output_dir={output}")
    command("adapt", *new, said=never)
    command(*resume, said=never)
    assert not sent
    command(*resume)
    moved = len(sent)
    assert moved > 30
    artefact = f"--policy.path={output / 'artefact'}"
    command("eval", artefact, "--eval.n_episodes=1", f"--output_dir={tmp_path / 'ev'}", said=never)
    command("probe", f"--policy.path={base}", f"--output_dir={tmp_path / 'probe'}", said=never, rc=2)
    assert main(["export", f"--run={output}"]) == 0
    assert len(sent) == moved


def test_probe_waits_for_the_person(base, tmp_path, capfd):
    options = ["--observations=4", "--noises=3", f"--output_dir={tmp_path / 'probe'}"]
    command("probe", f"--policy.path={base}", *options)
    assert "episode 1: put the scene right" in capfd.readouterr().out
    assert json.loads((tmp_path / "probe" / "probe.json").read_text())["success"] == {}


@pytest.mark.parametrize(
    "options, said",
    [
        (["--robot.type=no_such_robot"], "no_such_robot"),
        (["--robot.fps=15"], "--robot.type: name the robot, or wait for a station"),
        (["--robot.type=so101_follower"], "--robot.port: this option is required"),
        (["--robot.type=so101_follower", "--robot.port=/dev/null"], "_follower' cannot be connected: "),
        (["--robot.type=mujoco_arm", "--robot.fsp=3"], "--robot.fsp: no such option"),
        (["--robot.type=mujoco_arm", "--robot.fps=soon"], "--robot.fps: "),
        (["--robot.type=mujoco_arm", "--rl.type=golden_ticket"], "which a robot cannot repeat"),
        (["--robot.type=mujoco_arm", "--env.type=gym"], "--env.type: is gym; leave it out"),
    ],
)
def test_what_does_not_fit_is_one_line(base, tmp_path, capfd, options, said):
    assert main(["adapt", f"--policy.path={base}", *options, f"--output_dir={tmp_path / 'run'}"]) == 2
    error = capfd.readouterr().err
    assert error.count(said) == 1 and "Traceback" not in error
    assert not (tmp_path / "run").exists()  # so the same command will do once the cable is in
