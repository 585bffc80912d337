"""No command moves a stand-in for hardware unasked: its log holds the episodes of the run and no more."""

import json
import os
import signal
import time

import pytest

from tests.helpers.lane import LaneConfig, make_lane_policy
from trimtab.adapters import PolicyConfig, UserError, load_adapter
from trimtab.recipes.cli import main
from trimtab.recipes.finetune.rollouts import Rollouts
from trimtab.recipes.support.session import Session
from trimtab.recipes.support.shared_configs import EvalConfig, MachineConfig
from trimtab.rl.trainer import Trainer

EVAL = [
    *("--env.type=test_lane", "--policy.device=cpu", "--machine.workers=0", "--eval.batch_size=1"),
    *("--eval.n_episodes=2", "--eval.constant_candidates=0", "--env.episode_length=20"),
]
TRAIN = [
    *("--train.env_steps=120", "--train.warmup_transitions=8", "--train.first_update=8", "--num_envs=1"),
    *("--train.updates_per_transition=0.3", "--train.log_every=40", "--checkpoint.every=30"),
    *("--rl.type=dsrl_sac", "--rl.batch_size=8", "--train.replay_capacity=500"),
]


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return make_lane_policy(tmp_path_factory.mktemp("lane") / "policy")


def episodes(log):
    """Steps of each episode in a log, which is then removed; none may come before a reset has returned."""
    found, ready = [], False
    for line in log.read_text().splitlines() if log.exists() else ():
        if line == "step":
            assert ready, "a step before the reset had returned"
            found[-1] += 1
        else:
            ready = line == "reset ends"
            found += [0] if ready else []
    log.unlink(missing_ok=True)
    return found


def steps(entry):
    return round(entry["mean_steps"] * entry["episodes"])


def results(folder):
    found = json.loads((folder / "results.json").read_text())
    return [*found["policies"].values(), *([found["untrained_actor"]] if "untrained_actor" in found else [])]


def stop_at(env_steps, monkeypatch):
    learn = Trainer._learn

    def stopped(trainer):
        if trainer.env_steps >= env_steps and not trainer.stop():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
        learn(trainer)

    monkeypatch.setattr(Trainer, "_learn", stopped)


@pytest.mark.parametrize("workers", [0, 1])
def test_eval_moves_an_arm_in_its_episodes_alone(policy, workers, tmp_path, capsys):
    log, out = tmp_path / "log", tmp_path / "out"
    arm = [f"--policy.path={policy}", *EVAL, f"--machine.workers={workers}", "--env.manner=arm"]
    assert main(["eval", *arm, f"--env.log={log}", "--eval.videos=2", f"--output_dir={out}"]) == 0
    assert [steps(entry) for entry in results(out)] == [sum(pair) for pair in pairs(episodes(log))]
    said = capsys.readouterr().out
    assert said.count("note: this environment cannot repeat an episode: nothing moves before") == 1
    assert "no video rollouts.mp4: this environment cannot repeat" in said
    assert main(["eval", *arm, f"--env.log={log}", "--eval.videos=2", "--env.manner=plain",
                 f"--output_dir={tmp_path / 'simulator'}"]) == 0  # fmt: skip
    assert len(episodes(log)) == 3 + 4 + 2, "of a simulator: three of the examination, and the film"


def pairs(found):
    assert len(found) % 2 == 0
    return list(zip(found[::2], found[1::2], strict=True))


@pytest.mark.parametrize("manner", ["arm", "forgets_seed"])
def test_adapt_resume_and_export_move_an_arm_in_their_episodes_alone(
    policy, manner, tmp_path, monkeypatch, capsys
):
    log, out = tmp_path / "log", tmp_path / "out"
    begin = ["adapt", f"--policy.path={policy}", *EVAL, *TRAIN, f"--env.manner={manner}", f"--env.log={log}"]
    with monkeypatch.context() as patched:
        stop_at(50, patched)  # in the midst of an episode of twenty
        assert main([*begin, "--eval.videos=1", f"--output_dir={out}"]) == 0
    said = capsys.readouterr().out
    (last,) = [place for place in (out / "checkpoints").iterdir() if place.is_symlink()]
    at = json.loads((last / "manifest.json").read_text())["env_steps"]
    moved, known = episodes(log), json.loads((out / "baselines.json").read_text())["measured"]
    asked = 0 if manner == "arm" else 2  # what says nothing of itself is examined, once
    assert sum(moved[:asked]) == (4 if asked else 0)
    measured = [sum(one["steps"]) for task in known.values() for one in task.values()]
    assert [sum(pair) for pair in pairs(moved[asked : asked + 6])] == measured
    assert sum(moved[asked + 6 :]) == at < 120
    assert said.count("cannot repeat an episode") == (manner == "arm")
    assert said.count("warning: --env.type: the environment does not repeat") == (manner != "arm")

    assert main(["adapt", "--resume=true", f"--output_dir={out}"]) == 0
    said = capsys.readouterr().out
    moved = episodes(log)
    (steered,) = [e for name, e in json.loads((out / "results.json").read_text())["policies"].items()
                  if name == "steered"]  # fmt: skip
    filmed = 0 if manner == "arm" else 2
    ended = len(moved) - filmed
    assert sum(moved[ended - 2 : ended]) == steps(steered)
    in_all = json.loads((out / "results.json").read_text())["env_steps"]
    assert sum(moved[: ended - 2]) == in_all - at, "the interrupted episode is not played again"
    assert moved[0] > 0, "and the first reset is that of the first episode"
    assert "1 interrupted episode dropped, new ones begin: this environment cannot repeat them" in said
    assert (out / "before.mp4").exists() == ("no video" not in said)

    assert main(["export", f"--run={out}"]) == 0
    assert main(["eval", f"--policy.path={out / 'artefact'}", *EVAL, "--eval.videos=0", "--env.manner=arm",
                 f"--env.log={log}", f"--output_dir={tmp_path / 'again'}"]) == 0  # fmt: skip
    assert sum(episodes(log)) == sum(map(steps, results(tmp_path / "again")))


def test_probe_moves_an_arm_in_its_episodes_alone(policy, tmp_path):
    log, out = tmp_path / "log", tmp_path / "out"
    argv = ["probe", f"--policy.path={policy}", *EVAL, "--env.manner=arm", f"--env.log={log}"]
    assert main([*argv, "--observations=4", "--noises=4", "--repeats=0", f"--output_dir={out}"]) == 0
    moved = episodes(log)
    success = json.loads((out / "probe.json").read_text())["success"]
    assert moved[:4] == [4, 4, 4, 4], "a chunk of each of four episodes, to look at what comes after"
    assert [sum(pair) for pair in pairs(moved[4:])] == [steps(entry) for entry in success.values()]


def test_no_other_command_moves_an_arm_before_it_is_asked(policy, tmp_path, capsys):
    log = tmp_path / "log"
    config = LaneConfig(manner="arm", log=str(log))
    adapter = load_adapter(PolicyConfig(path=str(policy), device="cpu"))
    session = Session(adapter, config, EvalConfig(), MachineConfig(workers=0))
    with session.environments(1, keep_seen=True) as vec:
        assert not log.exists() and not vec.repeatable
        assert session.first is not None, "what fits is known from what the arm declares"
        Rollouts(session.runner, vec, session.own_noise, 0).collect(10, progress=False)
    assert sum(episodes(log)) == 10
    with session.environments(1):
        assert not log.exists()
    assert capsys.readouterr().out.count("note:") == 1


def test_what_does_not_fit_an_arm_is_known_before_it_moves(policy, tmp_path, monkeypatch):
    import gymnasium as gym

    log = tmp_path / "log"
    adapter = load_adapter(PolicyConfig(path=str(policy), device="cpu"))
    build = LaneConfig.create_envs

    def three_joints(config, *arguments):
        found = build(config, *arguments)
        found["test_lane"][0].envs[0].unwrapped.action_space = gym.spaces.Box(-1, 1, (3,))
        return found

    monkeypatch.setattr(LaneConfig, "create_envs", three_joints)
    session = Session(adapter, LaneConfig(manner="arm", log=str(log)), EvalConfig(), MachineConfig(workers=0))
    message = r"of shape \(2,\), the environment takes \(3,\)"
    with pytest.raises(UserError, match=message), session.environments(1):
        pass
    assert not log.exists()


ENVIRONMENTS = {
    "a vector": (["--env.manner=box"], "--env.type: observations must be a dict with agent_pos, "),
    "from the Hub": (
        ["--env.type=isaaclab_arena", "--env.hub_path=someone/some-env"],
        "--env.type: 'isaaclab_arena' is built by code from the Hub (--env.hub_path), which",
    ),
    "of HIL-SERL": (
        ["--env.type=gym_manipulator", "--env.name=gym_hil", "--env.task=PandaPickCubeBase-v0"],
        "--env.type: 'gym_manipulator' (gym_hil) is LeRobot's HIL-SERL set-up, which only",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_environments_that_are_not_run_here(name, policy, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options, message = ENVIRONMENTS[name]
    rest = [one for one in EVAL if not one.startswith("--env.") or "manner" in options[0]]
    assert main(["eval", f"--policy.path={policy}", *rest, *options]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert message in line and "Traceback" not in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("manner", ["succeed", "success", "silent"])
def test_success_by_another_name_is_read_and_said_once(manner, policy, tmp_path, capsys):
    base = ["eval", f"--policy.path={policy}", *EVAL, "--eval.n_episodes=20", "--eval.batch_size=10"]
    videos = ["--eval.videos=1"]  # further environments, in which nothing more is said
    assert main([*base, "--env.manner=plain", "--eval.videos=0", f"--output_dir={tmp_path / 'plain'}"]) == 0
    assert "note: success" not in capsys.readouterr().out
    assert main([*base, *videos, f"--env.manner={manner}", f"--output_dir={tmp_path / 'other'}"]) == 0
    said = capsys.readouterr().out
    if manner == "silent":
        assert "note: success" not in said
        return
    assert said.count(f"note: success is read from info['{manner}']") == said.count("note: success") == 1
    first, second = results(tmp_path / "plain"), results(tmp_path / "other")
    assert first == second and first[0]["successes"] > 0
