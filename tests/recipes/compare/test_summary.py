"""What a comparison says of its runs: levels, gains, dips, and the tables that the report makes of them."""

import json
import math
from fractions import Fraction
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from trimtab.recipes.compare.measure import RETURN, SUCCESS
from trimtab.recipes.compare.report import MARKDOWN, learning_row, rendered, row, write_report
from trimtab.recipes.compare.summary import dip, elsewhere, summarise, sustained
from trimtab.rl.statistics import bootstrap_interval, p_below

CONFIGS = Path(__file__).parents[3] / "recipes/configs"


def summary(won):
    count = won.count("1")
    return {"successes": count, "episodes": len(won), "success_rate": count / len(won), "won": won}


def test_gains_are_paired():
    found = SUCCESS.against(summary("1100"), [summary("1111"), summary("0011")])
    assert found["by_seed"] == [0.5, 0.0] and found["difference"] == 0.25 and found["ci95"] is None
    assert found["p"] == [0.5, 1.0]  # two of two: 2 / 2^2; two of four
    assert SUCCESS.against(summary("1100"), [summary("111")]) is None
    before = {"a": {"policy": summary("11")}, "b": {"policy": summary("10")}}
    after = [{"a": {"x": summary("11")}, "b": {"x": summary("01")}}]
    found = elsewhere(before, after, "x")
    assert found["change"] == 0.0 and found["flipped"] == 2 and found["episodes"] == 4
    after = [{"a": {"x": summary("01")}, "b": {"x": summary("10")}}]
    found = elsewhere(before, after, "x")
    assert found["change"] == pytest.approx(-0.25) and found["by_task"] == {"a": -0.5, "b": 0.0}


def returned(*values):
    low, high = bootstrap_interval(values)
    mean = {"return_mean": float(np.mean(values)), "return_ci95": [low, high]}
    return {"successes": None, "episodes": len(values), "success_rate": None, "returns": list(values), **mean}


def a_run(method, seed, final, points=()):
    policy = "policy" if seed is None else "actor"
    points = [{"grid": 10 * k, "env_steps": 10 * k, policy: one} for k, one in enumerate(points, 1)]
    run = {"task": "t", "method": method, "seed": seed, "points": points, "final": {policy: final}}
    return run | {"episodes": [], "cost": {}}


def test_where_others_report_success_none_is_zero(tmp_path):
    """Some environments report it in the step that succeeds alone; where none does, there is none."""
    runs = [a_run("base", None, summary("1010")), a_run("m", 0, returned(0.0, 0, 0, 0), [returned(0, 0)])]
    write_report(tmp_path, "t", [], runs, [])
    _, entry = json.loads((tmp_path / "compare.json").read_text())["methods"]
    assert entry["measure"] == "success" and entry["success"]["successes"] == 0
    assert entry["against_base"]["by_seed"] == [-0.5] and entry["last_point"]["episodes"] == 2
    others = {"a": {"policy": summary("11")}, "b": {"policy": returned(1.0, 2.0)}}
    after = {"a": {"actor": returned(0.0, 0.0)}, "b": {"actor": returned(1.0, 2.0)}}
    runs = [a_run("base", None, summary("1010")), a_run("m", 0, summary("1110"))]
    write_report(tmp_path, "t", [], [runs[0] | {"others": others}, runs[1] | {"others": after}], [])
    _, entry = json.loads((tmp_path / "compare.json").read_text())["methods"]
    assert entry["other_tasks"]["by_task"] == {"a": -1.0} and entry["other_tasks"]["episodes"] == 2
    runs = [a_run("base", None, returned(1.0, 2.0)), a_run("m", 0, returned(2.0, 3.0))]
    write_report(tmp_path, "t", [], runs, [])
    assert {one["measure"] for one in json.loads((tmp_path / "compare.json").read_text())["methods"]} == {
        "return"
    }


def test_a_seed_without_a_curve_leaves_the_others_their_result():
    runs = [a_run("base", None, summary("1010")), a_run("m", 0, summary("1110"), [summary("10")])]
    runs.append(a_run("m", 1, summary("1111")))
    for order in (runs, [runs[0], *runs[:0:-1]]):
        _, entry = summarise(order)
        assert entry["success"]["successes"] == 7 and entry["to_level"] is None is entry["last_point"]


def test_tasks_without_success_are_judged_by_their_return():
    """Gains are paired on episodes, over the mean of the seeds; levels are above the base's interval."""
    rng = np.random.default_rng(0)
    hard = 50 * rng.normal(size=40)  # how an episode is differs far more than what is gained in each
    base = returned(*hard)
    runs = [{"task": "t", "method": "base", "seed": None, "points": [], "episodes": [], "cost": {}}]
    runs[0]["final"] = {"policy": base}
    for seed in (0, 1):
        means = (0, 60, 0, 70, 80 + seed)
        points = [
            {"grid": 100 * k, "env_steps": 100 * k, "actor": returned(*(hard + mean))}
            for k, mean in enumerate(means, 1)
        ]
        final = {"actor": returned(*(hard + 5 + seed + rng.normal(size=40)))}
        runs.append({**runs[0], "method": "m", "seed": seed, "points": points, "final": final})
        runs[-1]["episodes"] = [[50 * k, 0, 1] for k in range(1, 11)]
    base_entry, entry = summarise(runs)
    assert entry["measure"] == "return" and "success" not in entry and entry["dips"] is None
    gain = entry["against_base"]
    assert gain["difference"] == pytest.approx(5.5, abs=0.5) and len(gain["by_seed"]) == 2
    low, high = gain["ci95"]
    assert low < gain["difference"] < high and 0.2 < high - low < 1.0, "not that of unpaired episodes"
    assert base_entry["return"]["return_ci95"][1] - base_entry["return"]["return_ci95"][0] > 20
    assert entry["return"]["episodes"] == 80 and len(entry["return_by_seed"]) == 2
    assert entry["to_level"]["base"]["steps"] == [400, 400]  # a fall to the base begins anew
    assert entry["to_level"]["base"]["episodes_median"] == 8
    found, learning = row(entry), learning_row(entry)
    assert found["return"].startswith(f"{entry['return']['return_mean']:.4g} [") and "(80)" in found["return"]
    assert found["gain over the base"] == f"{gain['difference']:+.4g} [{low:+.4g}, {high:+.4g}]"
    assert found["steps (episodes) until it stays above the base"] == "400 (8)"
    assert learning["steps until it stays above the base, each seed"] == "400, 400"
    text = rendered(MARKDOWN, "x", [], [base_entry, entry])
    assert "McNemar" not in text and "Wilson" not in text and "points" not in text and "success" not in text
    assert "bootstrap" in text and row(base_entry)["steps (episodes) until it stays above the base"] == "-"
    both = {"a": {"policy": base}}
    found = elsewhere(both, [{"a": {"x": returned(*(hard + 2))}}], "x", RETURN)
    assert found["change"] == pytest.approx(2.0) and found["flipped"] == found["episodes"] == 40


def record(seed, rates, won):
    points = [
        {"grid": 100 * k, "env_steps": 100 * k + 8, "actor": summary("1" * r + "0" * (10 - r))}
        for k, r in enumerate(rates, 1)
    ]
    return {
        "task": "t",
        "method": "m",
        "seed": seed,
        "points": points,
        "episodes": [[50, 0, 1], [100, 1, 1], [180, 1, 1], [290, 1, 1]],
        "final": {"actor": summary(won)},
        "cost": {"cpu_seconds": 10.0 + seed, "artefact_bytes": 2_000_000},
    }


def test_levels_and_rows():
    base = {"task": "t", "method": "base", "seed": None, "points": [], "episodes": [], "cost": {}}
    base["final"] = {"policy": summary("1000")}
    runs = [base, record(0, [6, 9, 9], "1111"), record(1, [9, 5, 8], "1110"), record(2, [1, 2, 3], "1110")]
    entry = next(row for row in summarise(runs) if row["method"] == "m")
    assert entry["to_level"]["50"]["steps"] == [100, 100, None]
    assert entry["to_level"]["80"]["steps"] == [200, 300, None]  # a fall below it begins anew
    assert entry["to_level"]["80"]["steps_median"] == 300
    assert entry["to_level"]["80"]["episodes"] == [3, 4, None]
    assert entry["to_level"]["90"]["steps_median"] is None
    assert entry["success"]["successes"] == 10 and entry["success"]["episodes"] == 12
    assert entry["cpu_seconds"] == 11.0 and entry["artefact_mb"] == 2.0
    found = list(row(entry).values())
    assert found[4:7] == ["100 (2)", "300 (4)", "> 308"] and found[3] == "0.5000"
    assert "| m |" in rendered(MARKDOWN, "x", [], [entry]) and "+58.3 points" in found[2]


def test_the_median_of_two_seeds_is_the_later():
    runs = [record(0, [6, 9, 9], "11"), record(1, [9, 5, 8], "10"), record(2, [1, 2, 3], "10")]
    (entry,) = summarise(runs[:2])
    assert entry["to_level"]["80"]["steps"] == [200, 300] and entry["to_level"]["80"]["steps_median"] == 300
    assert entry["to_level"]["80"]["episodes_median"] == 4
    runs[2]["points"][-1]["env_steps"] = 320
    (entry,) = summarise([runs[0], runs[2]])
    assert list(row(entry).values())[5] == "> 320"  # not within what either has spent
    assert entry["to_level"]["80"]["steps"] == [200, None] and entry["to_level"]["80"]["steps_median"] is None


def points(*rates):
    return [
        {"grid": 2000 * (i + 1), "actor": {"successes": round(100 * rate), "episodes": 100}}
        for i, rate in enumerate(rates)
    ]


def test_sustained():
    ninety = partial(SUCCESS.reaches, "90", None)
    assert sustained(points(0.5, 0.95, 0.8, 0.9, 0.97), "actor", ninety) == 8000
    assert sustained(points(0.9, 0.9), "actor", ninety) == 2000
    assert sustained(points(0.95, 0.95, 0.89), "actor", ninety) is None
    assert sustained(points(0.1, 0.2, 0.9), "actor", ninety) == 6000

    def plain(rates):  # by the definition
        for i in range(len(rates)):
            if all(rate >= 0.9 for rate in rates[i:]):
                return 2000 * (i + 1)
        return None

    rng = np.random.default_rng(0)
    for _ in range(200):
        rates = [float(rate) for rate in rng.choice([0.85, 0.9, 0.95], size=rng.integers(1, 7))]
        assert sustained(points(*rates), "actor", ninety) == plain(rates)


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


@pytest.mark.parametrize("recipe", ["metaworld", "metaworld_suite"])
def test_the_stored_comparison_makes_its_page(recipe):
    """The figures of a recipe's comparison: compare.md is made of compare.json."""
    stored = CONFIGS / recipe / "comparison"
    found = json.loads((stored / "compare.json").read_text())
    made = rendered(MARKDOWN, found["title"], found["facts"], found["methods"], found["aggregates"])
    assert made == (stored / "compare.md").read_text()


def test_what_happened_while_learning():
    base = {"task": "t", "method": "base", "seed": None, "points": [], "episodes": [], "cost": {}}
    base["final"] = {"policy": summary("1111111100")}
    long = record(0, [6, 9, 9], "11") | {"episodes": [[100 * k, k % 2, 1] for k in range(1, 61)]}
    short = record(1, [1, 2, 10], "10")
    entry = next(row for row in summarise([base, long, short]) if row["method"] == "m")
    assert entry["last_point"]["successes"] == 19 and entry["last_point"]["episodes"] == 20
    assert entry["dips"][0]["windows"] == 11 and entry["dips"][0]["lowest"] == 0.5
    assert entry["dips"][1] is None  # four episodes are no window
    below, found = entry["dips"][0]["below"], list(learning_row(entry).values())
    assert found[0] == "m" and found[1] == "200, 300" and found[3:] == ["0.50, -", f"{below}/11, -"]
    assert f"| {' | '.join(found)} |" in rendered(MARKDOWN, "x", [], [entry])
