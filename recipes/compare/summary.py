"""What the runs of a comparison say together: one entry per task, method and policy, over all seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from trimtab.recipes.bench.report import sustained
from trimtab.rl.statistics import mcnemar, paired_difference, wilson_interval

LEVELS = (0.5, 0.8, 0.9)
COSTS = ("peak_mb", "wall_seconds", "cpu_seconds")


def outcomes(summary: dict[str, Any]) -> list[bool] | None:
    """Whether each episode succeeded, where the summary says."""
    return [letter == "1" for letter in summary["won"]] if summary.get("won") else None


def pool(summaries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All episodes of all seeds as one rate with its 95 % Wilson interval."""
    won, of = (sum(summary[name] for summary in summaries) for name in ("successes", "episodes"))
    low, high = wilson_interval(won, of)
    return {"successes": won, "episodes": of, "success_rate": won / of, "ci95": [low, high]}


def against(base: dict[str, Any], summaries: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """How much better than ``base`` on the same episodes: ``None`` where they cannot be paired.

    Returns:
        ``difference`` of the success rates, of all seeds together; ``ci95`` of it, where there is one seed
        (seeds share the base's episodes, so that together they are not independent); ``p`` of McNemar's
        exact test for each seed.
    """
    first = outcomes(base)
    found = [outcomes(summary) for summary in summaries]
    if first is None or any(second is None or len(second) != len(first) for second in found):
        return None
    differences = [paired_difference(first, second) for second in found]
    return {
        "difference": statistics.fmean(difference[0] for difference in differences),
        "by_seed": [difference[0] for difference in differences],
        "ci95": list(differences[0][1:]) if len(differences) == 1 else None,
        "p": [mcnemar(first, second) for second in found],
    }


def elsewhere(
    before: dict[str, dict[str, Any]], after: Sequence[dict[str, dict[str, Any]]], policy: str
) -> dict[str, Any] | None:
    """Success on the other tasks before and after, on the same episodes, of all seeds together.

    Args:
        before: the base's: task -> policy -> summary.
        after: each run's, likewise.
        policy: which of its policies.

    Returns:
        ``before`` and ``after`` (rates), ``change``, ``flipped`` (episodes that ended otherwise),
        ``episodes``, and the change ``by_task``; ``None`` where there are no other tasks.
    """
    pairs = {task: [(found["policy"], run[task][policy]) for run in after] for task, found in before.items()}
    rows = [pair for found in pairs.values() for pair in found]
    if not rows:
        return None
    was, now = pool([pair[0] for pair in rows]), pool([pair[1] for pair in rows])
    flipped = sum(a != b for old, new in rows for a, b in zip(old["won"], new["won"], strict=True))
    by_task = {
        task: pool([new for _, new in found])["success_rate"]
        - pool([old for old, _ in found])["success_rate"]
        for task, found in pairs.items()
    }
    return {
        "before": was["success_rate"],
        "after": now["success_rate"],
        "change": now["success_rate"] - was["success_rate"],
        "flipped": flipped,
        "episodes": was["episodes"],
        "by_task": by_task,
    }


def reached(runs: Sequence[dict[str, Any]], policy: str) -> dict[str, dict[str, Any]]:
    """Environment steps and episodes to each level: of each seed, and their median (the higher of two)."""
    found = {}
    for level in LEVELS:
        steps = [sustained(run["points"], policy, level) for run in runs]
        episodes = [
            None if step is None or not run["episodes"] else sum(end[0] <= step for end in run["episodes"])
            for step, run in zip(steps, runs, strict=True)
        ]
        found[f"{100 * level:.0f}"] = {
            "steps": steps,
            "steps_median": _median(steps),
            "episodes": episodes,
            "episodes_median": _median(episodes),
        }
    return found


def _median(values: Sequence[float | None]) -> float | None:
    middle = statistics.median_high([math.inf if value is None else value for value in values])
    return None if math.isinf(middle) else middle


def summarise(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry per task, method and policy that was evaluated.

    Args:
        runs: records, each with ``task``, ``method`` and ``seed`` (``None`` of what does not learn).
    """
    entries = []
    for task, method in dict.fromkeys((run["task"], run["method"]) for run in runs):
        mine = [run for run in runs if (run["task"], run["method"]) == (task, method)]
        mine.sort(key=lambda run: run["seed"] or 0)
        bases = [run for run in runs if run["task"] == task and run["method"] == "base"]
        entries += [
            _entry(task, method, policy, mine, bases[0] if bases else None) for policy in mine[0]["final"]
        ]
    return entries


def _entry(
    task: str, method: str, policy: str, runs: list[dict[str, Any]], base: dict[str, Any] | None
) -> dict[str, Any]:
    finals = [run["final"][policy] for run in runs]
    entry: dict[str, Any] = {
        "task": task,
        "method": method,
        "policy": policy,
        "seeds": [run["seed"] for run in runs],
        "success": pool(finals),
        "success_by_seed": [final["success_rate"] for final in finals],
        "against_base": None,
        "to_level": reached(runs, policy) if runs[0]["points"] else None,
        "env_steps": [run["points"][-1]["env_steps"] if run["points"] else 0 for run in runs],
        "training_episodes": [len(run["episodes"]) or run.get("search_episodes", 0) for run in runs],
        "trainable_parameters": runs[0]["cost"].get("trainable_parameters", {}).get(policy),
        "artefact_mb": _mean([run["cost"].get("artefact_bytes") for run in runs], 1e-6),
        **{name: _mean([run["cost"].get(name) for run in runs]) for name in COSTS},
        "left_on": None,
        "switched_off": None,
    }
    if base is None or method == "base":
        return entry
    entry["against_base"] = against(base["final"]["policy"], finals)
    before = base.get("others") or {}
    if all("others" in run for run in runs):
        entry["left_on"] = elsewhere(before, [run["others"] for run in runs], policy)
    if all("base_elsewhere" in run for run in runs):
        entry["switched_off"] = elsewhere(before, [run["base_elsewhere"] for run in runs], "policy")
    return entry


def _mean(values: Sequence[float | None], scale: float = 1.0) -> float | None:
    known = [value for value in values if value is not None]
    return scale * statistics.fmean(known) if known else None
