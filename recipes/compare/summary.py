"""What the runs of a comparison say together: one entry per task, method and policy, over all seeds."""

import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from trimtab.recipes.compare.measure import SUCCESS, Measure, measure_of
from trimtab.rl.statistics import p_below

COSTS = ("peak_mb", "wall_seconds", "cpu_seconds")
WINDOW = 50  # training episodes
DIP_STEPS = 10_000  # environment steps within which dips are looked for
SIGNIFICANT = 0.05
# Names in tables, where a method's own would mislead.
METHOD_NAMES = {
    "dsrl_na_paper": "DSRL-NA, paper's settings",
    "dsrl_sac_paper": "DSRL-SAC, paper's settings",
    "dsrl_sac_paper_short": "DSRL-SAC, paper's settings, short warm-up",
}
POLICIES = {"policy": "", "actor": "", "acting": ", best of K as in training"}


def elsewhere(
    before: dict[str, dict[str, Any]],
    after: Sequence[dict[str, dict[str, Any]]],
    policy: str,
    measure: Measure = SUCCESS,
) -> dict[str, Any] | None:
    """The mean on the other tasks before and after, on the same episodes, of all seeds together.

    Args:
        before: the base's: task -> policy -> summary.
        after: each run's, likewise.
        policy: which of its policies.

    Returns:
        ``before`` and ``after`` (means), ``change``, ``flipped`` (episodes that ended otherwise),
        ``episodes``, and the change ``by_task``, of the tasks that report what is measured; ``None`` where
        there are none.
    """
    pairs = {
        task: [(found["policy"], run[task][policy]) for run in after]
        for task, found in before.items()
        if found["policy"][measure.mean] is not None
    }
    if not pairs:
        return None
    every = [pair for found in pairs.values() for pair in found]
    was, now = (measure.pool(side) for side in zip(*every))
    by_task = {}
    for task, found in pairs.items():
        old, new = (measure.pool(side)[measure.mean] for side in zip(*found))
        by_task[task] = new - old
    return {
        "before": was[measure.mean],
        "after": now[measure.mean],
        "change": now[measure.mean] - was[measure.mean],
        "flipped": sum(int((measure.values(old) != measure.values(new)).sum()) for old, new in every),
        "episodes": was["episodes"],
        "by_task": by_task,
    }


def sustained(
    points: Sequence[dict[str, Any]], policy: str, reached: Callable[[dict[str, Any]], bool]
) -> int | None:
    """First grid point from which this and all later ones have ``reached`` a level, if there is one."""
    first = None
    for point in reversed(points):
        if not reached(point[policy]):
            break
        first = point["grid"]
    return first


def to_levels(
    runs: Sequence[dict[str, Any]], policy: str, measure: Measure, base: dict[str, Any] | None
) -> dict[str, dict[str, Any]]:
    """Environment steps and episodes to each level: of each seed, and their median (the higher of two)."""
    found: dict[str, dict[str, Any]] = {}
    for level in measure.level_names:
        steps = [sustained(run["points"], policy, partial(measure.reaches, level, base)) for run in runs]
        episodes = [
            None if step is None or not run["episodes"] else sum(end[0] <= step for end in run["episodes"])
            for step, run in zip(steps, runs, strict=True)
        ]
        values = found[level] = {"steps": steps, "episodes": episodes}
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
    measures = {
        task: measure_of([run for run in runs if run["task"] == task]) for task in {key[0] for key in groups}
    }
    entries = []
    for (task, method), mine in groups.items():
        mine.sort(key=lambda run: run["seed"] or 0)
        base = groups.get((task, "base"), [None])[0] if method != "base" else None
        for policy in mine[0]["final"]:
            entry = _entry(policy, mine, base, measures[task])
            entries.append({"task": task, "method": method, "policy": policy, **entry})
    return entries


def _entry(
    policy: str, runs: list[dict[str, Any]], base: dict[str, Any] | None, measure: Measure
) -> dict[str, Any]:
    finals, curves = [run["final"][policy] for run in runs], all(run["points"] for run in runs)
    own = base and [base["final"]["policy"], *(point["policy"] for point in base["points"])]
    every = measure.pool(own) if own else None
    found = {
        "has_acting": "acting" in runs[0]["final"],
        "measure": measure.name,
        "seeds": [run["seed"] for run in runs],
        measure.name: measure.pool(finals),
        f"{measure.name}_by_seed": [final[measure.mean] for final in finals],
        "to_level": to_levels(runs, policy, measure, every) if curves else None,
        "last_point": measure.pool([run["points"][-1][policy] for run in runs]) if curves else None,
        "env_steps": [run["points"][-1]["env_steps"] if run["points"] else 0 for run in runs],
        "training_episodes": [len(run["episodes"]) or run.get("search_episodes", 0) for run in runs],
        "trainable_parameters": runs[0]["cost"].get("trainable_parameters", {}).get(policy),
        "artefact_mb": _mean([run["cost"].get("artefact_bytes") for run in runs], 1e-6),
        **{name: _mean([run["cost"].get(name) for run in runs]) for name in COSTS},
        **dict.fromkeys(("against_base", "dips", "other_tasks", "base_afterwards")),
    }
    if base is None:
        return found
    found["against_base"] = measure.against(base["final"]["policy"], finals)
    if measure is SUCCESS and any(run["episodes"] for run in runs):
        found["dips"] = [dip(run["episodes"], every) for run in runs]
    before = base.get("others") or {}
    if all(run.get("others") for run in runs):
        found["other_tasks"] = elsewhere(before, [run["others"] for run in runs], policy, measure)
    if all(run.get("base_elsewhere") for run in runs):
        after = [run["base_elsewhere"] for run in runs]
        found["base_afterwards"] = elsewhere(before, after, "policy", measure)
    return found


def _mean(values: Sequence[float | None], scale: float = 1.0) -> float | None:
    known = [value for value in values if value is not None]
    return scale * statistics.fmean(known) if known else None


def label(entry: dict[str, Any]) -> str:
    """The name of a row."""
    method = METHOD_NAMES.get(entry["method"], entry["method"])
    if entry["policy"] == "actor" and entry.get("has_acting"):
        return f"{method}, as deployed"
    return method + POLICIES.get(entry["policy"], f", {entry['policy']}")
