"""What a comparison says over all tasks and seeds: rliable's figures, and steps to a method's final level."""

import json
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure

from trimtab.adapters import UserError
from trimtab.recipes.compare import aggregates
from trimtab.recipes.compare.aggregates import aggregate
from trimtab.recipes.compare.config import CompareConfig
from trimtab.recipes.compare.plots import plot_aggregates
from trimtab.recipes.compare.report import aggregate_row, write_report

EPISODES = 100


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr(aggregates, "RESAMPLES", 200)


def won(rate):
    of, count = EPISODES, round(rate * EPISODES)
    kept = "1" * count + "0" * (of - count)
    return {"successes": count, "episodes": of, "success_rate": rate, "won": kept}


def paid(mean):
    found = {"return_mean": mean, "return_ci95": [mean - 1, mean + 1], "returns": [mean - 1, mean + 1]}
    return {"successes": None, "episodes": 2, "success_rate": None, **found}


def a_run(task, method, seed, curve, kind=won):
    """The last number of the curve is that of the final evaluation; what learns nothing has no other."""
    policy = "policy" if seed is None else "actor"
    *points, final = [{policy: kind(value)} for value in curve]
    grid = 100 if seed is not None else 0
    points = [{"grid": k * grid, "env_steps": k * grid, **one} for k, one in enumerate(points, 1)]
    run = {"task": task, "method": method, "seed": seed, "points": points, "final": final, "cost": {}}
    return run | {"episodes": [] if seed is None else [[50, 1, 1]]}


def suite():
    """Two tasks, three seeds: ours is as high after a step or two as the paper's after four."""
    runs = [a_run(task, "base", None, [0.4, 0.4]) for task in "ab"]
    for seed in range(3):
        late = seed > 0
        for task, final in (("a", 0.9), ("b", 0.8)):
            ours = [0.6 if late else 0.5, 0.8, 0.9, 0.9, final + 0.01 * seed]
            paper = [0.4, 0.45, 0.5, 0.56 if late else 0.5, 0.6 + 0.01 * seed]
            runs += [a_run(task, "ours", seed, ours), a_run(task, "paper", seed, paper)]
    return [*runs, a_run("a", "once", 0, [0.9, 0.9])]  # not run on both tasks


def replaced(runs, method, curve, seeds):
    """The runs, where those of a method have another curve."""
    return [
        a_run(run["task"], method, run["seed"], curve)
        if run["method"] == method and run["seed"] in seeds
        else run
        for run in runs
    ]


def test_means_and_improvements_are_those_of_their_definitions():
    runs = suite()
    state = np.random.get_state()[1].tolist()
    found = {entry["method"]: entry for entry in aggregate(runs, "ours", "")}
    assert list(found) == ["base", "ours", "paper"] and np.random.get_state()[1].tolist() == state
    scores = sorted([0.90, 0.91, 0.92, 0.80, 0.81, 0.82])
    assert found["ours"]["iqm"] == pytest.approx(np.mean(scores[1:-1]))
    low, high = found["ours"]["iqm_ci95"]
    assert scores[0] <= low < found["ours"]["iqm"] < high <= scores[-1]
    assert found["base"]["iqm"] == pytest.approx(0.4) and found["base"]["iqm_ci95"] is None
    assert found["paper"]["improvement"] == 1.0 and "improvement" not in found["ours"]
    assert aggregate(runs, "paper", "")[1]["improvement"] == 0.0
    equal = [a_run(t, m, s, [0.5, 0.5 + 0.1 * s]) for t in "ab" for m in ("x", "y") for s in range(2)]
    equal[-1] = a_run("b", "y", 1, [0.5, 0.55])
    # On a, the same: a half. On b, x has 0.5 and 0.6, y 0.5 and 0.55: a tie, a loss, two wins.
    assert aggregate(equal, "x", "")[1]["improvement"] == pytest.approx((0.5 + 2.5 / 4) / 2)
    assert aggregate(runs, "ours", "") == aggregate(runs, "ours", "")


def test_a_run_of_few_tasks_and_seeds_has_no_aggregates():
    one = [run for run in suite() if run["task"] == "a" and run["seed"] in (None, 0, 1)]
    assert aggregate(one, "ours", "") == []
    assert aggregate([*one, a_run("a", "ours", 2, [0.5, 0.9])], "ours", "")


def test_steps_to_the_final_level_of_a_method():
    """The paper's is 0.54 on each task, the mean of 0.5, 0.56 and 0.56."""

    def of_ours(runs):
        found = {entry["method"]: entry for entry in aggregate(runs, "ours", "paper")}
        assert "share" not in found["paper"] and "share" not in found["base"]
        return found["ours"], aggregate_row(found["ours"])["share of the steps of paper to its final level"]

    ours, said = of_ours(suite())  # seed 0: at the second of four points; 1 and 2: at the first
    assert ours["share"] == 0.25 and ours["share_ci95"] == [0.25, 0.5] and ours["reached"] == 6
    assert said == "0.250 [0.250, 0.500] (6/6)"
    ours, said = of_ours(replaced(suite(), "ours", [0.5] * 5, (0, 1)))
    assert ours["share"] is None and ours["share_ci95"] == [0.25, None] and ours["reached"] == 2
    assert said == "never [0.250, never] (2/6)"
    assert of_ours(replaced(suite(), "base", [0.6, 0.4], (None,)))[0]["share"] == 0.0, "the base is as high"


def test_the_same_rate_is_that_level():
    """The mean of three times 0.8 is a little more than 0.8 in floats."""
    runs = [a_run("a", "base", None, [0.4, 0.4])]
    runs += [a_run("a", name, seed, [0.4, 0.8, 0.8]) for name in ("ours", "paper") for seed in range(3)]
    (ours,) = (one for one in aggregate(runs, "ours", "paper") if one["method"] == "ours")
    assert ours["share"] == 1.0 and ours["reached"] == 3


def test_a_score_below_zero_is_in_the_figure(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *path, **how: shown.append(figure))
    entry = {"method": "ours", "policy": "actor", "iqm": -0.6, "iqm_ci95": [-0.7, -0.5]}
    entry |= {"improved": "ours", "reach": ""}
    plot_aggregates(tmp_path / "a.png", [entry, entry | {"iqm": 1.0, "iqm_ci95": None}])
    low, high = shown[0].axes[0].get_xlim()
    assert low <= -0.7 and high >= 1.0


def test_returns_are_scored_as_multiples_of_the_bases():
    runs = [a_run(task, "base", None, [10.0 * k, 10.0 * k], paid) for k, task in enumerate("ab", 1)]
    runs += [a_run(t, "ours", s, [9.0, 30.0 * k], paid) for k, t in enumerate("ab", 1) for s in range(2)]
    found = aggregate(runs, "ours", "")
    assert [entry["iqm"] for entry in found] == [1.0, 3.0]
    runs[1] = a_run("b", "base", None, [-2.0, -2.0], paid)
    with pytest.raises(ValueError, match=r"base's mean return, on b it is -2\.0"):
        aggregate(runs, "ours", "")


def test_the_report_has_them_or_says_what_is_missing(tmp_path, monkeypatch):
    text = write_report(tmp_path, "Suite", ["a fact"], suite(), [], ("ours", "paper"))
    assert "## All tasks" in text and "| ours | 6 | 0.8" in text and "[0.250, 0.500] (6/6)" in text
    assert (tmp_path / "aggregates.png").stat().st_size > 5000 and text.endswith("(aggregates.png)\n")
    assert len(json.loads((tmp_path / "compare.json").read_text())["aggregates"]) == 3
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2 and "All tasks" in page
    assert "## All tasks" not in write_report(tmp_path, "Suite", [], suite(), [])
    monkeypatch.setitem(sys.modules, "rliable", None)
    text = write_report(tmp_path, "Suite", [], suite(), [], ("ours", ""))
    assert "no aggregates over tasks and seeds: " in text and "'lerobot_policy_trimtab[compare]'" in text


def test_a_method_that_takes_no_part_is_refused():
    for option in ("improved", "reach"):
        with pytest.raises(UserError, match=f"--{option}: 'best_of_n' takes no part; "):
            CompareConfig(methods="steered", **{option: "best_of_n"})
    assert CompareConfig(methods="residual", reach="residual").improved == "steered"
