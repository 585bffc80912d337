"""What the runs of a comparison say together: one entry per task, method and policy, over all seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from trimtab.rl.statistics import mcnemar, p_below, paired_difference, wilson_interval

LEVELS = (0.5, 0.8, 0.9)
COSTS = ("peak_mb", "wall_seconds", "cpu_seconds")
WINDOW = 50  # training episodes
DIP_STEPS = 10_000  # environment steps within which dips are looked for
SIGNIFICANT = 0.05


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
    before, *after = ([letter == "1" for letter in one.get("won") or ""] for one in (base, *summaries))
    if not before or any(len(won) != len(before) for won in after):
        return None
    differences = [paired_difference(before, won) for won in after]
    return {
        "difference": statistics.fmean(difference[0] for difference in differences),
        "by_seed": [difference[0] for difference in differences],
        "ci95": list(differences[0][1:]) if len(differences) == 1 else None,
        "p": [mcnemar(before, won) for won in after],
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
    if not pairs:
        return None
    every = [pair for found in pairs.values() for pair in found]
    was, now = (pool(side) for side in zip(*every))
    by_task = {}
    for task, found in pairs.items():
        old, new = (pool(side)["success_rate"] for side in zip(*found))
        by_task[task] = new - old
    return {
        "before": was["success_rate"],
        "after": now["success_rate"],
        "change": now["success_rate"] - was["success_rate"],
        "flipped": sum(a != b for old, new in every for a, b in zip(old["won"], new["won"], strict=True)),
        "episodes": was["episodes"],
        "by_task": by_task,
    }


def sustained(points: Sequence[dict[str, Any]], policy: str, level: float = LEVELS[-1]) -> int | None:
    """First grid point from which this and all later ones are at ``level`` or above, if there is one."""
    first = None
    for point in reversed(points):
        if point[policy]["successes"] < level * point[policy]["episodes"]:
            break
        first = point["grid"]
    return first


def reached(runs: Sequence[dict[str, Any]], policy: str) -> dict[str, dict[str, Any]]:
    """Environment steps and episodes to each level: of each seed, and their median (the higher of two)."""
    found: dict[str, dict[str, Any]] = {}
    for level in LEVELS:
        steps = [sustained(run["points"], policy, level) for run in runs]
        episodes = [
            None if step is None or not run["episodes"] else sum(end[0] <= step for end in run["episodes"])
            for step, run in zip(steps, runs, strict=True)
        ]
        values = found[f"{100 * level:.0f}"] = {"steps": steps, "episodes": episodes}
        for name, of in tuple(values.items()):
            middle = statistics.median_high([math.inf if value is None else value for value in of])
            values[f"{name}_median"] = None if math.isinf(middle) else middle
    return found


def dip(
    episodes: Sequence[Sequence[int]], base: dict[str, Any], window: int = WINDOW, until: int = DIP_STEPS
) -> dict[str, Any] | None:
    """Training success in windows of ``window`` consecutive episodes against the base's.

    Args:
        episodes: [environment step at its end, success, steered], in the order of their ends.
        base: summary of the base's evaluation.
        window: episodes in a window.
        until: windows that end by this environment step count.

    Returns:
        ``windows``: how many there are (they overlap); ``below``: in how many success is significantly below
        the base's (one-sided 95 %, Fisher's exact test, each window for itself); ``lowest`` rate, ``at``
        which environment step, and its ``p``. ``None``: not one window.
    """
    counted = [(step, won) for step, won, _ in episodes if step <= until]
    ends = range(window, len(counted) + 1)
    found = [(sum(won for _, won in counted[end - window : end]), counted[end - 1][0]) for end in ends]
    if not found:
        return None
    p = {won: p_below(won, window, base["successes"], base["episodes"]) for won in {won for won, _ in found}}
    lowest, at = min(found)
    return {
        "windows": len(found),
        "below": sum(p[won] <= SIGNIFICANT for won, _ in found),
        "lowest": lowest / window,
        "at": at,
        "p": p[lowest],
    }


def summarise(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry per task, method and policy that was evaluated.

    Args:
        runs: records, each with ``task``, ``method`` and ``seed`` (``None`` of what learns nothing).
    """
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["task"], run["method"]), []).append(run)
    entries = []
    for (task, method), mine in groups.items():
        mine.sort(key=lambda run: run["seed"] or 0)
        base = groups.get((task, "base"), [None])[0] if method != "base" else None
        for policy in mine[0]["final"]:
            entries.append({"task": task, "method": method, "policy": policy, **_entry(policy, mine, base)})
    return entries


def _entry(policy: str, runs: list[dict[str, Any]], base: dict[str, Any] | None) -> dict[str, Any]:
    finals, curves = [run["final"][policy] for run in runs], bool(runs[0]["points"])
    found = {
        "has_acting": "acting" in runs[0]["final"],
        "seeds": [run["seed"] for run in runs],
        "success": pool(finals),
        "success_by_seed": [final["success_rate"] for final in finals],
        "to_level": reached(runs, policy) if curves else None,
        "last_point": pool([run["points"][-1][policy] for run in runs]) if curves else None,
        "env_steps": [run["points"][-1]["env_steps"] if run["points"] else 0 for run in runs],
        "training_episodes": [len(run["episodes"]) or run.get("search_episodes", 0) for run in runs],
        "trainable_parameters": runs[0]["cost"].get("trainable_parameters", {}).get(policy),
        "artefact_mb": _mean([run["cost"].get("artefact_bytes") for run in runs], 1e-6),
        **{name: _mean([run["cost"].get(name) for run in runs]) for name in COSTS},
        **dict.fromkeys(("against_base", "dips", "other_tasks", "base_afterwards")),
    }
    if base is None:
        return found
    found["against_base"] = against(base["final"]["policy"], finals)
    if any(run["episodes"] for run in runs):
        every = pool([base["final"]["policy"], *(point["policy"] for point in base["points"])])
        found["dips"] = [dip(run["episodes"], every) for run in runs]
    before = base.get("others") or {}
    if all(run.get("others") for run in runs):
        found["other_tasks"] = elsewhere(before, [run["others"] for run in runs], policy)
    if all(run.get("base_elsewhere") for run in runs):
        found["base_afterwards"] = elsewhere(before, [run["base_elsewhere"] for run in runs], "policy")
    return found


def _mean(values: Sequence[float | None], scale: float = 1.0) -> float | None:
    known = [value for value in values if value is not None]
    return scale * statistics.fmean(known) if known else None
