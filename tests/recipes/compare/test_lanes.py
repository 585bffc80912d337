"""Comparisons on a lane: of a task that reports no success, and of tasks that have a base each."""

import json

import pytest

from tests.helpers.lane import make_lane_policy
from trimtab.recipes.cli import main
from trimtab.recipes.compare.from_recipe import comparison

SETTINGS = {"steered": {"rl": {"batch_size": 8}, "train": {"first_update": 8, "warmup_transitions": 0}}}
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
    after = record["final"]["actor"]["returns"]
    rows = {row["method"]: row for row in json.loads((output / "compare.json").read_text())["methods"]}
    gain = sum(b - a for a, b in zip(base["returns"], after)) / 4
    assert rows["steered"]["against_base"]["difference"] == pytest.approx(gain)
    assert rows["base"]["return"]["return_mean"] == pytest.approx(sum(base["returns"]) / 4)
    text = (output / "compare.md").read_text()
    assert "until it stays above the base" in text and "McNemar" not in text and "the base has return" in text


def test_a_recipe_that_learns_from_the_reward_leaves_out_what_counts_successes():
    found = comparison(
        {"train": {"reward": "env"}, "rl": {"type": "best_of_n"}}, {"from_rollouts": True}, False
    )
    assert found["reward"] == "env" and "train" not in found["settings"]["steered"]
    assert found["methods"] == "base,zero_noise,steered,residual" and set(found["settings"]) == {"steered"}
