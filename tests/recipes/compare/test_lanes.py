"""Comparisons on a lane: of a task that reports no success, and of tasks that have a base each."""

import json
import shutil

import pytest

from tests.helpers.faulty import files_of_at_most
from tests.helpers.lane import KNOWN, make_lane_policy
from trimtab.recipes.cli import main
from trimtab.recipes.compare.bases import env_of
from trimtab.recipes.compare.config import CompareConfig
from trimtab.recipes.compare.from_recipe import comparison
from trimtab.recipes.support.option_dicts import read_arguments
from trimtab.recipes.support.options import parse
from trimtab.rl.envs.gym import GymConfig
from trimtab.rl.runs.checkpoint import Checkpoints

FEW = {"first_update": 8, "warmup_transitions": 0, "updates_per_transition": 1.0}
SETTINGS = {"steered": {"rl": {"type": "dsrl_sac", "batch_size": 8}, "train": FEW}}
SMALL = {
    "policy.device": "cpu",
    "env.type": "test_lane",
    "env.manner": "dense",
    "methods": "steered",
    "settings": json.dumps(SETTINGS),
    **{"env_steps": 160, "grid": 80, "n_episodes": 3, "final_episodes": 4, "batch_size": 3, "num_envs": 2},
    **{"videos": 0, "seeds": 1, "isolate": "false", "machine.workers": 0, "machine.threads": 1},
}


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return make_lane_policy(tmp_path_factory.mktemp("lane") / "base")


def run(policy, output, **more):
    chosen = SMALL | {"policy.path": policy, "output_dir": output} | more
    return main(["compare", *(f"--{key}={value}" for key, value in chosen.items())])


def refused(capsys):
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    return line


def test_a_task_without_success_is_compared_by_its_return(policy, tmp_path, capsys):
    output = tmp_path / "out"
    assert run(policy, output, methods="steered,lora_rollouts,golden_ticket") == 2
    line = refused(capsys)
    assert "--reward: Lane-v0 reported no success in 4 episodes, and steered, lora_rollouts" in line
    assert run(policy, output, methods="steered,lora_rollouts,golden_ticket", reward="env") == 2
    assert "--methods: " in (line := refused(capsys)) and "leave out lora_rollouts, golden_ticket" in line
    assert [path.name for path in (output / "runs" / "Lane-v0").iterdir()] == ["base.json"]
    assert run(policy, output, methods="zero_noise,steered", reward="env") == 0
    said = capsys.readouterr().out
    assert "base.json is there already" in said and "0.0 %" not in said
    base = json.loads((output / "runs/Lane-v0/base.json").read_text())["final"]["policy"]
    assert len(base["returns"]) == 4 and not base["won"] and base["success_rate"] is None
    record = json.loads((output / "runs/Lane-v0/steered-seed0.json").read_text())
    assert record["settings"]["method"]["train"]["reward"] == "env" and record["updates"] > 0
    low, high = record["reward_range"]  # as `adapt` measures it
    assert low < high and low <= base["return_mean"] / base["mean_steps"] <= high
    after = record["final"]["actor"]["returns"]
    rows = {row["method"]: row for row in json.loads((output / "compare.json").read_text())["methods"]}
    gain = sum(b - a for a, b in zip(base["returns"], after)) / 4
    assert rows["steered"]["against_base"]["difference"] == pytest.approx(gain)
    assert rows["base"]["return"]["return_mean"] == pytest.approx(sum(base["returns"]) / 4)
    text = (output / "compare.md").read_text()
    assert "until it stays above the base" in text and "McNemar" not in text and "the base has return" in text


def test_a_full_disk_is_one_line(policy, tmp_path, capsys):
    with files_of_at_most(8000):  # enough for configs, and no figure
        assert run(policy, tmp_path / "out", methods="base") == 2
    line = refused(capsys)
    assert "--output_dir: cannot write to " in line and line.endswith("then go on with the same command")


def settled(output):
    """What a run has found, without its times; and its weights."""
    record = json.loads((output / "runs/Lane-v0/steered-seed0.json").read_text())
    record.pop("cost")
    lines = record.pop("metrics")
    kept = [{key: line[key] for key in line if not key.startswith("seconds")} for line in lines]
    weights = output / "runs/Lane-v0/steered-seed0/artefact/model.safetensors"
    return record, kept, weights.read_bytes()


def test_a_run_that_was_stopped_goes_on_and_ends_as_if_it_had_not_been(policy, tmp_path, capsys, monkeypatch):
    more = {"env.manner": "pit", "checkpoint.every": 40}
    assert run(policy, tmp_path / "whole", **more) == 0
    save, saved = Checkpoints.save, []

    def stop(self, env_steps, state):
        save(self, env_steps, state)
        saved.append(env_steps)
        if len(saved) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", stop)
        assert run(policy, tmp_path / "cut", **more) == 130
    folder = tmp_path / "cut/runs/Lane-v0/steered-seed0-checkpoints"
    assert 80 < saved[-1] < 160 and folder.is_dir() and not folder.with_name("steered-seed0.json").exists()
    shutil.copytree(tmp_path / "cut", tmp_path / "other")
    capsys.readouterr()
    assert run(policy, tmp_path / "cut", **more) == 0
    assert f"going on from {saved[-1]} environment steps" in capsys.readouterr().out
    (before, lines, weights), after = settled(tmp_path / "whole"), settled(tmp_path / "cut")
    assert [point["grid"] for point in before["points"]] == [80, 160] and before["episodes"]
    assert after[0] == before and after[1] == lines and after[2] == weights
    assert not folder.exists() and not list((tmp_path / "whole").rglob("*checkpoints"))
    changed = json.dumps({"steered": {**SETTINGS["steered"], "noise": {"type": "repeat"}}})
    assert run(policy, tmp_path / "other", settings=changed, **more) == 0  # another run, from its beginning
    assert "going on" not in capsys.readouterr().out
    assert settled(tmp_path / "other")[0]["updates"] > 0


def test_each_task_has_its_own_base_where_the_path_names_it(tmp_path, capsys):
    make_lane_policy(tmp_path / "near")
    output, log = tmp_path / "out", str(tmp_path / "{task}.log")
    more = {"env.type": "test_lanes", "env.manner": "pit", "env.log": log, "methods": "base"}
    argv = {"policy": tmp_path / "{task}", "output": output, **more}
    assert run(**argv) == 2 and "--tasks: name the tasks that {task} stands for" in refused(capsys)
    assert run(**argv, tasks="near,far") == 2
    assert f"--policy.path: there is no folder {tmp_path / 'far'}" in refused(capsys) and not output.exists()
    make_lane_policy(tmp_path / "far", down_dims=(16, 16))
    assert run(**argv, tasks="near,far", other_tasks="far") == 2
    assert "--other_tasks: a base of its own for each task ({task}) knows no other" in refused(capsys)
    (tmp_path / "far" / KNOWN).write_text("near")
    assert run(**argv, tasks="near,far") == 2 and "never seen the lane 'far'" in refused(capsys)
    (tmp_path / "far" / KNOWN).unlink()
    assert not output.exists() and run(**argv, tasks="near,far", isolate="false") == 0
    near, far = (json.loads((output / "runs" / task / "base.json").read_text()) for task in ("near", "far"))
    assert near["settings"]["base_sha256"] != far["settings"]["base_sha256"]
    assert near["settings"]["env"]["log"] == str(tmp_path / "near.log") and near["others"] == {}
    assert (tmp_path / "far.log").stat().st_size > 100
    text = (output / "compare.md").read_text()
    for task, record in (("near", near), ("far", far)):
        assert f"base policy of {task}: diffusion, weights {record['settings']['base_sha256'][:12]}" in text


def test_a_task_stands_for_itself_in_every_text_of_the_environment():
    said = read_arguments(["--env.id={task}"])["env"]
    env = GymConfig(**said, kwargs={"a": ["x-{task}", 3], "b": {"c": "{task}"}})
    hopper = env_of(env, "Hopper-v5")
    assert hopper.id == hopper.task == "Hopper-v5"
    assert hopper.kwargs == {"a": ["x-Hopper-v5", 3], "b": {"c": "Hopper-v5"}} and env.id == "{task}"


def test_a_tiny_comparison_stands_for_the_first_task(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path))
    said = {"policy": {"path": "outputs/base/{task}"}, "env": {"type": "gym", "id": "{task}"}}
    said |= {
        "tasks": "mine, other",
        "methods": "steered,best_of_n",
        "reach": "best_of_n",
        "improved": "best_of_n",
    }
    (tmp_path / "compare.json").write_text(json.dumps(said))
    argv = ["--tiny=true", f"--config_path={tmp_path / 'compare.json'}"]
    config = parse(CompareConfig, "compare", argv)  # metaworld's base is outputs/base/mine
    assert (config.tasks, config.methods, config.reach) == ("", "steered", "")
    assert config.env.type == "pusht" and "{task}" not in config.policy.path


def test_a_recipe_that_learns_from_the_reward_leaves_out_what_counts_successes():
    found = comparison(
        {"train": {"reward": "env"}, "rl": {"type": "best_of_n"}}, {"from_rollouts": True}, False
    )
    assert found["reward"] == "env" and "train" not in found["settings"]["steered"]
    assert found["methods"] == "base,zero_noise,steered,residual" and set(found["settings"]) == {"steered"}
