"""The bench: the rival's environment is the collector's, runs are kept, and the report counts right."""

import json
import math
from fractions import Fraction
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.benchmarks.sb3 import SB3SACConfig
from tests.helpers.point import PointAdapter, PointConfig
from trimtab.adapters import PolicyConfig, UserError, load_adapter
from trimtab.adapters.checkpoint.identity import file_hash
from trimtab.recipes.bench.methods import METHODS, Method, Setup, run_method
from trimtab.recipes.bench.report import dip, sustained
from trimtab.recipes.cli import main
from trimtab.recipes.cli.bench import BenchConfig, once
from trimtab.recipes.finetune.training import TuningConfig
from trimtab.rl.algorithms import BestOfNConfig
from trimtab.rl.budget import TrainConfig
from trimtab.rl.envs.metaworld import MetaworldStateConfig
from trimtab.rl.envs.vector import ChunkVectorEnv
from trimtab.rl.statistics import p_below

GAMMA = 0.9
SMALL = [
    "--tasks=drawer-close",
    "--episode_length=20",
    "--num_envs=4",
    "--workers=0",
]
SAMPLES = [
    *SMALL,
    "--methods=best_of_n,sb3_sac",
    "--env_steps=400",
    "--grid=200",
    "--n_episodes=4",
    "--final_episodes=3",
    "--base_episodes=5",
    "--batch_size=4",
]


def point_run(grid):
    """A short best-of-N run on the point, evaluated every ``grid`` steps."""
    method = Method(
        BestOfNConfig(num_candidates=4, target_candidates=2, batch_size=16, acting="thompson"),
        train=TrainConfig(first_update=16, warmup_transitions=0, updates_per_transition=1.0),
    )
    config, adapter = PointConfig(), PointAdapter()
    with ChunkVectorEnv(config, 3, 0) as vec:
        setup = Setup(adapter, Path(), config, vec, 300, grid, [1, 2, 3, 4], [5, 6], num_envs=3, workers=0)
        return run_method(method, setup, 0, "point")


def test_evaluations_leave_the_run_alone():
    often, once_ = point_run(60), point_run(300)
    assert [point["grid"] for point in often["points"]] == [60, 120, 180, 240, 300]
    assert [point["grid"] for point in once_["points"]] == [300]
    assert often["episodes"] == once_["episodes"] and often["updates"] == once_["updates"] > 0
    assert often["points"][-1]["actor"] == once_["points"][-1]["actor"]
    assert often["final"] == once_["final"]
    assert {"actor", "acting"} <= set(often["final"])
    assert often["final"]["acting"]["episodes"] == 2


def test_samples_through_both_engines_and_again(tiny_base, tmp_path, capsys):
    output = tmp_path / "bench"
    command = ["bench", f"--base={tiny_base}", *SAMPLES, f"--output_dir={output}"]
    small = {"first_update": 64, "warmup_transitions": 0, "updates_per_transition": 2.0}
    assert METHODS["best_of_n"].settings()["train"].items() >= small.items()
    assert main([*command, "--seeds=0"]) == 0
    folder = output / "runs" / "drawer-close-v3"
    names = ["base.json", "best_of_n-seed0.json", "sb3_sac-seed0.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    for name, policies in (("best_of_n", {"actor", "acting"}), ("sb3_sac", {"actor"})):
        run = json.loads((folder / f"{name}-seed0.json").read_text())
        assert [point["grid"] for point in run["points"]] == [200, 400]
        for point in run["points"]:
            assert {key for key in point if isinstance(point[key], dict)} == policies
            assert point["actor"]["episodes"] == 4
        assert run["final"]["actor"]["episodes"] == 3
        assert len(run["episodes"]) >= 10 and all(step <= 416 for step, _, _ in run["episodes"])
    assert json.loads((folder / "base.json").read_text())["base"]["episodes"] == 5
    table = (output / "samples.md").read_text()
    assert (
        "| best_of_n | actor |" in table and "| best_of_n | best of N |" in table and "| sb3_sac |" in table
    )
    assert (output / "samples.png").stat().st_size > 5000
    written = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    capsys.readouterr()
    assert main([*command, "--seeds=0", "--methods=sb3_sac"]) == 0  # nothing is run twice
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == written
    assert capsys.readouterr().out.count("is there already") == 2
    assert main([*command, "--seeds=0", "--methods=sb3_sac", "--n_episodes=3"]) == 0
    assert "other settings" in capsys.readouterr().out
    changed = {path.name for path in folder.iterdir() if path.stat().st_mtime_ns != written[path.name]}
    assert changed == {"sb3_sac-seed0.json"}


def test_filtered_behaviour_cloning_trains_a_copy_of_the_base(drawer_base):
    env = MetaworldStateConfig(task="drawer-close-v3", episode_length=100)
    adapter = load_adapter(PolicyConfig(path=str(drawer_base), device="cpu"))
    before = {name: value.clone() for name, value in adapter.policy.state_dict().items()}
    hashed = file_hash(drawer_base)
    method = Method(None, tuning=TuningConfig(method="full", steps=20, learning_rate=5e-4, batch_size=16))
    with ChunkVectorEnv(env, 3, 0) as vec:
        setup = Setup(adapter, drawer_base, env, vec, 1600, 800, [1, 2, 3], [5, 6], num_envs=4, workers=0)
        run = run_method(method, setup, 0, "rival")
    assert [point["env_steps"] for point in run["points"]] == [800, 1600]  # to the step
    assert {key for key in run["points"][0] if isinstance(run["points"][0][key], dict)} == {"actor"}
    assert run["points"][0]["actor"]["episodes"] == 3 and run["final"]["actor"]["episodes"] == 2
    rounds = {step for step, won, _ in run["episodes"] if won}  # fine-tuned after each with a success
    assert rounds and run["updates"] == 20 * len(rounds)
    assert run["trained_parameters"] == sum(p.numel() for p in adapter.policy.parameters())
    assert all(torch.equal(before[name], value) for name, value in adapter.policy.state_dict().items())
    assert file_hash(drawer_base) == hashed


def test_methods_are_what_their_names_say():
    """The paper's settings, and those that make our SAC the rival's."""
    from trimtab.rl.algorithms.presets import PAPER

    paper, short = METHODS["dsrl_sac_paper"], METHODS["dsrl_sac_paper_short"]
    for name, value in PAPER["dsrl_sac"]["rl"].items():
        have = getattr(paper.rl, name)
        if isinstance(value, dict):
            assert all(getattr(have, key) == entry for key, entry in value.items())
        else:
            assert have == value
    assert paper.num_envs == 4 and paper.noise.bound == 1.5 and paper.train.warmup_transitions == 6004
    assert paper.rl == short.rl and short.train.warmup_transitions == short.train.first_update == 800
    ours, theirs = METHODS["dsrl_sac_as_sb3"], SB3SACConfig()
    for name in ("learning_rate", "batch_size", "gamma", "tau", "initial_temperature"):
        assert getattr(ours.rl, name) == getattr(theirs, name)
    assert ours.rl.actor.hidden == ours.rl.critic.hidden == theirs.hidden
    assert ours.rl.actor.layers == ours.rl.critic.layers == theirs.layers and ours.rl.actor_every == 1
    assert ours.rl.n_step == 1 and ours.rl.backup_entropy and not ours.rl.critic.layer_norm
    assert ours.rl.target_entropy is None and theirs.target_entropy_per_dim == -0.25  # our default too
    for name in ("warmup_transitions", "updates_per_transition", "replay_capacity"):
        assert ours.settings()["train"][name] == getattr(theirs, name)
    assert len({json.dumps(method.settings(), sort_keys=True) for method in METHODS.values()}) == len(METHODS)


def test_once_runs_what_is_missing_or_of_other_settings(tmp_path, capsys):
    path, calls = tmp_path / "a" / "run.json", []

    def run():
        calls.append(1)
        return {"value": len(calls)}

    assert once(path, {"x": 1, "y": [2]}, run)["value"] == 1
    assert once(path, {"y": [2], "x": 1}, run)["value"] == 1
    assert once(path, {"x": 2, "y": [2]}, run)["value"] == 2
    assert json.loads(path.read_text())["settings"] == {"x": 2, "y": [2]}


def points(*rates):
    return [
        {"grid": 2000 * (i + 1), "actor": {"successes": round(100 * rate), "episodes": 100}}
        for i, rate in enumerate(rates)
    ]


def test_sustained():
    assert sustained(points(0.5, 0.95, 0.8, 0.9, 0.97), "actor") == 8000
    assert sustained(points(0.9, 0.9), "actor") == 2000
    assert sustained(points(0.95, 0.95, 0.89), "actor") is None
    assert sustained(points(0.1, 0.2, 0.9), "actor") == 6000

    def plain(rates):  # by the definition
        for i in range(len(rates)):
            if all(rate >= 0.9 for rate in rates[i:]):
                return 2000 * (i + 1)
        return None

    rng = np.random.default_rng(0)
    for _ in range(200):
        rates = [float(rate) for rate in rng.choice([0.85, 0.9, 0.95], size=rng.integers(1, 7))]
        assert sustained(points(*rates), "actor") == plain(rates)


def test_p_below_counts_all_ways_to_deal_the_successes():
    for won, of, base_won, base_of in ((0, 3, 4, 5), (1, 4, 3, 4), (3, 3, 1, 5), (0, 2, 0, 4), (2, 5, 2, 3)):
        successes = won + base_won
        deals = list(combinations(range(of + base_of), successes))  # who succeeds
        few = sum(sum(who < of for who in deal) <= won for deal in deals)
        assert p_below(won, of, base_won, base_of) == pytest.approx(float(Fraction(few, len(deals))))
    assert p_below(10, 50, 180, 300) < 1e-6 and p_below(30, 50, 180, 300) > 0.4
    for wrong in ((1, 0, 1, 2), (3, 2, 1, 2), (-1, 2, 1, 2), (1, 2, 3, 2)):
        with pytest.raises(ValueError):
            p_below(*wrong)


def test_dip_against_every_window_by_hand():
    rng = np.random.default_rng(1)
    episodes = [[100 * (i + 1), int(rng.random() < (0.2 if 40 <= i < 80 else 0.7)), 1] for i in range(140)]
    base = {"successes": 195, "episodes": 300}
    found = dip(episodes, base, window=20, until=12_000)
    below, lowest, windows = 0, math.inf, 0
    for start in range(140):
        window = episodes[start : start + 20]
        if len(window) < 20 or window[-1][0] > 12_000:
            continue
        won = sum(success for _, success, _ in window)
        windows += 1
        p = sum(
            math.comb(195 + won, k) * math.comb(320 - 195 - won, 20 - k) for k in range(won + 1)
        ) / math.comb(320, 20)
        below += p <= 0.05
        if won < lowest:
            lowest, at, lowest_p = won, window[-1][0], p
    assert found == {
        "windows": windows,
        "below": below,
        "lowest": lowest / 20,
        "at": at,
        "p": pytest.approx(lowest_p),
    }
    assert windows == 101 and 0 < below < windows
    assert dip(episodes[:19], base, window=20) is None
    assert dip([[i, 1, 1] for i in range(60)], base)["below"] == 0


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("methods", "best_of_n,magic"),
        ("methods", ","),
        ("seeds", "0,x"),
        ("seeds", "-1"),
        ("grid", 30_000),
        ("env_steps", 0),
        ("final_episodes", -1),
        ("episode_length", 501),
        ("device", "tpu"),
    ],
)
def test_bad_options_are_named(option, value):
    with pytest.raises(UserError) as error:
        BenchConfig(**{option: value})
    assert error.value.option == f"--{option}"


def test_a_gpu_is_asked_for_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device: 'cuda' is not usable here"):
        BenchConfig(device="cuda")


def test_bench_needs_a_base_and_keeps_out_of_other_folders(tiny_base, tmp_path, capsys):
    assert main(["bench"]) == 2
    assert "--base" in capsys.readouterr().err
    (tmp_path / "mine.txt").write_text("hands off")
    assert main(["bench", f"--base={tiny_base}", *SMALL, f"--output_dir={tmp_path}"]) == 2
    assert "--output_dir" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
