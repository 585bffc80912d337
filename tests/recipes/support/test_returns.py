"""Tasks that report no success: the return is shown, and nothing is called 0 %."""

import json

import numpy as np
import pytest
import torch

import tests.helpers.lane as lane
from tests.helpers.lane import SMALL, TRAIN
from trimtab.adapters import PolicyConfig, load_adapter
from trimtab.policies.noise_samplers import constant_noise, own_noise
from trimtab.recipes.cli import main
from trimtab.recipes.support.run_folder import decode, encode
from trimtab.recipes.support.session import Session
from trimtab.recipes.support.shared_configs import EpisodesConfig, MachineConfig
from trimtab.rl.envs.vector import ChunkVectorEnv
from trimtab.rl.evaluation import Evaluation, evaluate, pooled, require_success
from trimtab.rl.runner import PolicyRunner
from trimtab.rl.statistics import bootstrap_interval


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return lane.make_lane_policy(tmp_path_factory.mktemp("lane") / "base")


def run(command, policy, output, *options):
    argv = [command, f"--policy.path={policy}", *SMALL, f"--output_dir={output}", *options]
    return main(argv)


def test_eval_shows_the_return(policy, tmp_path, capsys):
    assert run("eval", policy, tmp_path / "out", "--env.manner=dense") == 0
    said = capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert "0.0 %" not in said and said.count("not reported") == 3 and "return [95 % interval]" in said
    for entry in results["policies"].values():
        assert entry["success_rate"] is None and entry["successes"] is None and entry["ci95"] is None
        low, high = entry["return_ci95"]
        assert low <= entry["return_mean"] <= high and f"{entry['return_mean']:.4g} [{low:.4g}" in said
    assert "selection_return" in results["constant_noise_search"]


def test_eval_names_what_info_holds_where_success_is_not_in_it(policy, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(lane.SUCCESS_KEYS, "plain", "goal_reached")
    assert run("eval", policy, tmp_path / "out", "--eval.constant_candidates=0") == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: the env")]
    assert "never reported success in 4 episodes (its info held: goal_reached; with" in line
    assert "read from is_success, success, succeed" in line


def test_eval_warns_where_the_first_of_two_names_never_says_success(policy, tmp_path, capsys, monkeypatch):
    def step(self, action, plain=lane.LaneEnv.step):
        *rest, info = plain(self, action)
        return *rest, {"is_success": False, "success": info["is_success"]}

    monkeypatch.setattr(lane.LaneEnv, "step", step)
    assert run("eval", policy, tmp_path / "out", "--eval.constant_candidates=0") == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert "no episode of 4 succeeded; info holds success, too" in line and "is_success, success" in line


def test_the_return_is_all_that_the_environment_paid(policy):
    class Counting(ChunkVectorEnv):
        paid = 0.0

        def receive(self):
            results = super().receive()
            self.paid += sum(found.rewards.sum() for found in results.values() if hasattr(found, "rewards"))
            return results

    config, adapter = lane.LaneConfig(manner="dense"), load_adapter(PolicyConfig(str(policy), device="cpu"))
    with Counting(config, 3, 0) as vec:
        source = own_noise(adapter.noise_spec)
        found = evaluate(PolicyRunner(adapter, config), vec, source, range(5), progress=False)
    assert found.returns.sum() == pytest.approx(vec.paid) and not found.reported
    assert len(set(found.returns.tolist())) == 5 and found.steps.max() > 4, "of more chunks than one"


def test_success_is_shown_as_before_where_it_is_reported(policy, tmp_path, capsys):
    assert run("eval", policy, tmp_path / "out", "--env.manner=pit") == 0
    said = capsys.readouterr().out
    assert "not reported" not in said and "return [" not in said
    entry = json.loads((tmp_path / "out" / "results.json").read_text())["policies"]["base"]
    assert entry["return_mean"] == entry["success_rate"], "this environment pays 1 for success"


def test_success_that_is_said_where_there_is_one_alone(policy):
    """A policy that never succeeds there has 0 %, where another has succeeded."""
    adapter = load_adapter(PolicyConfig(str(policy), device="cpu"))
    episodes = EpisodesConfig(n_episodes=20, batch_size=20, videos=0)
    session = Session(adapter, lane.LaneConfig(manner="terse"), episodes, MachineConfig(workers=0))
    back = constant_noise(torch.full(adapter.noise_spec.shape, -2.0))
    with session.evaluation_environments() as vec:
        unknown = session.evaluate(vec, back, "back", range(4))
        some = session.evaluate(vec, session.own_noise, "own")
    with session.evaluation_environments() as vec:  # which have seen no success
        none = session.evaluate(vec, back, "back")
    assert not unknown.reported and unknown.summary()["success_rate"] is None
    assert 0 < some.successes.sum() < 20
    assert none.reported and none.summary()["successes"] == 0 and none.summary()["ci95"][0] == 0.0


@pytest.mark.parametrize("options", [[], ["--rl.type=golden_ticket"]])
def test_nothing_to_learn_from_is_refused_before_training(policy, tmp_path, capsys, options):
    budget = [one for one in TRAIN[:5] if not options or "env_steps" not in one]
    assert run("adapt", policy, tmp_path / "out", *budget, "--env.manner=dense", *options) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert (
        "never reported success in" in line
        and "--train.reward=env" in line
        and "its info held: nothing" in line
    )
    assert not (tmp_path / "out").exists()


def test_adapt_learns_from_the_reward_and_shows_the_return(policy, tmp_path, capsys):
    output = tmp_path / "out"
    more = ["--env.manner=dense", "--train.reward=env", "--checkpoint.every=80"]
    assert run("adapt", policy, output, *TRAIN, *more) == 0
    said = capsys.readouterr().out
    assert "0.0 %" not in said and "not reported" in said and "success not reported, return " in said
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert all(line["success_rate"] is None for line in lines)
    assert np.isfinite(lines[-1]["return_mean"]) and (output / "curve.png").stat().st_size > 10_000
    results = json.loads((output / "results.json").read_text())
    assert results["policies"]["steered"]["return_mean"] is not None
    assert results["machine"]["threads"] == 1
    held = json.loads((output / "baselines.json").read_text())["measured"]["Lane-v0"]["base"]
    assert np.mean(held["returns"]) == pytest.approx(results["policies"]["base"]["return_mean"])
    assert main(["export", f"--run={output}", "--policy.device=cpu"]) == 0
    card = (output / "export" / "README.md").read_text()
    assert "not reported" in card and "return [95 % interval]" in card and "0.0 %" not in card


def test_nothing_is_handed_over_by_successes_that_nobody_reports(policy, tmp_path, capsys):
    argv = ["adapt", f"--policy.path={policy}", *SMALL, *TRAIN, "--env.manner=silent", "--train.reward=env"]
    argv += ["--train.gate.enabled=true", f"--output_dir={tmp_path / 'run'}"]
    assert main(argv) == 2
    assert "--train.warmup_transitions: has no effect with --train.gate" in capsys.readouterr().err
    assert main([*argv, "--train.warmup_transitions=0"]) == 2
    assert "--train.gate.enabled: the environment never reported" in capsys.readouterr().err


def test_what_counts_successes_alone_refuses(policy, tmp_path, capsys):
    argv = ["lora", f"--policy.path={policy}", *SMALL[:5], "--env.manner=silent", "--from_rollouts=true"]
    assert main([*argv, f"--output_dir={tmp_path / 'lora'}"]) == 2
    assert "never reported success in 4 episodes" in capsys.readouterr().err


def test_probe_judges_by_the_return(policy, tmp_path, capsys):
    argv = [
        "probe",
        f"--policy.path={policy}",
        *SMALL,
        "--env.manner=dense",
        "--repeats=0",
        "--observations=2",
    ]
    assert main([*argv, f"--output_dir={tmp_path / 'probe'}"]) == 0
    said = capsys.readouterr().out
    assert "can be steered, by return" in said and "--train.reward=env" in said and "0.0 %" not in said
    report = json.loads((tmp_path / "probe" / "probe.json").read_text())
    assert report["success"]["base"]["success_rate"] is None and report["constants"] == []


def test_the_record_of_an_evaluation_comes_back():
    one = Evaluation(
        [1, 2], np.array([0, 1], bool), np.array([3, 4]), {}, np.array([0.5, -2.0]), False, ("x",)
    )
    again = decode(json.loads(json.dumps(encode(one))))
    assert again.returns.tolist() == [0.5, -2.0] and not again.reported and again.info_keys == ("x",)
    without = decode(json.loads(json.dumps(encode(Evaluation([1], np.array([True]), np.array([3]))))))
    assert without.returns is None and without.reported and "return_mean" not in without.summary()
    both = pooled([one, one])
    assert both.returns.tolist() == [0.5, -2.0] * 2 and not both.reported
    with pytest.raises(Exception, match=r"info held: x"):
        require_success(one)


def test_bootstrap_interval():
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    low, high = bootstrap_interval(values)
    half = 1.96 * 2.0 / 20  # of the mean of 400 draws with deviation 2
    assert high - low == pytest.approx(2 * half, rel=0.15) and low < values.mean() < high
    assert bootstrap_interval([5.0, 5.0]) == (5.0, 5.0) and bootstrap_interval(values) == (low, high)
    with pytest.raises(ValueError, match="no values"):
        bootstrap_interval([])
