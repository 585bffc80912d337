"""What the bench's runs say: table, JSON and curves."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trimtab.recipes.support.reporting import METHOD_NAMES, rate_text, write_json
from trimtab.rl.statistics import p_below, wilson_interval

LEVEL = 0.9  # of "sustained"
WINDOW = 50  # training episodes
DIP_STEPS = 10_000  # environment steps in which dips are looked for
SIGNIFICANT = 0.05
POLICIES = {"actor": "actor", "acting": "best of N"}


def sustained(points: Sequence[dict[str, Any]], policy: str, level: float = LEVEL) -> int | None:
    """First grid point from which this and all later points are at ``level`` or above; ``None``: there is
    none.
    """
    first = None
    for point in reversed(points):
        if point[policy]["successes"] < level * point[policy]["episodes"]:
            break
        first = point["grid"]
    return first


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
    if len(counted) < window:
        return None
    found = []
    for end in range(window, len(counted) + 1):
        won = sum(success for _, success in counted[end - window : end])
        found.append((won, counted[end - 1][0]))
    p = {won: p_below(won, window, base["successes"], base["episodes"]) for won in {won for won, _ in found}}
    lowest, at = min(found)
    return {
        "windows": len(found),
        "below": sum(p[won] <= SIGNIFICANT for won, _ in found),
        "lowest": lowest / window,
        "at": at,
        "p": p[lowest],
    }


def summarise(runs: Sequence[dict[str, Any]], bases: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry per task, method and evaluated policy, with all seeds.

    Args:
        runs: contents of the runs' files.
        bases: evaluation of the base, by task.
    """
    entries: list[dict[str, Any]] = []
    for task, method in dict.fromkeys((run["task"], run["method"]) for run in runs):
        mine = [run for run in runs if (run["task"], run["method"]) == (task, method)]
        mine.sort(key=lambda run: run["seed"])
        for policy in POLICIES:
            if not all(run["points"] and policy in run["points"][0] for run in mine):
                continue
            reached = [sustained(run["points"], policy) for run in mine]
            middle = statistics.median_high([math.inf if step is None else step for step in reached])
            entry: dict[str, Any] = {
                "task": task,
                "method": method,
                "policy": policy,
                "seeds": [run["seed"] for run in mine],
                "sustained": reached,
                "sustained_median": None if math.isinf(middle) else middle,
                "last_point": _pool([run["points"][-1][policy] for run in mine]),
                "final": None,
                "dips": [dip(run["episodes"], bases[task]) for run in mine],
                "training_seconds": [run["seconds"]["training"] for run in mine],
            }
            if all("final" in run for run in mine):
                entry["final"] = _pool([run["final"][policy] for run in mine])
                entry["final_by_seed"] = [run["final"][policy]["success_rate"] for run in mine]
            entries.append(entry)
    return entries


def _pool(summaries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    won, of = (sum(summary[name] for summary in summaries) for name in ("successes", "episodes"))
    low, high = wilson_interval(won, of)
    return {"successes": won, "episodes": of, "success_rate": won / of, "ci95": [low, high]}


def samples_table(entries: Sequence[dict[str, Any]], bases: dict[str, dict[str, Any]], env_steps: int) -> str:
    """Markdown."""
    lines: list[str] = []
    for task, base in bases.items():
        lines += [
            f"### {task}",
            "",
            f"Base: {rate_text(base)}.",
            "",
            "| method | policy | sustained 90 %, steps (each seed) | median | success at the last point "
            "| at the end | lowest window of 50 (each seed) | windows below the base | training, s |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for entry in entries:
            if entry["task"] != task:
                continue
            dips = entry["dips"]
            lines.append(
                f"| {METHOD_NAMES.get(entry['method'], entry['method'])} | {POLICIES[entry['policy']]} "
                f"| {', '.join(_steps(step, env_steps) for step in entry['sustained'])} "
                f"| {_steps(entry['sustained_median'], env_steps)} | {rate_text(entry['last_point'])} "
                f"| {rate_text(entry['final']) if entry['final'] else '-'} "
                f"| {', '.join(f'{found["lowest"]:.2f}' if found else '-' for found in dips)} "
                f"| {', '.join(f'{found["below"]}/{found["windows"]}' if found else '-' for found in dips)} "
                f"| {statistics.median(entry['training_seconds']):.0f} |"
            )
        lines.append("")
    return "\n".join(lines)


def _steps(steps: float | None, env_steps: int) -> str:
    return f"> {env_steps}" if steps is None else f"{steps:.0f}"


def plot(path: Path, runs: Sequence[dict[str, Any]], bases: dict[str, dict[str, Any]]) -> None:
    """Success against environment steps: a panel per task, a thin line per seed, a thick one of medians."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curves = list(
        dict.fromkeys((run["method"], p) for run in runs for p in POLICIES if p in run["points"][0])
    )
    figure, axes = plt.subplots(
        1, len(bases), figsize=(6.0 * len(bases), 4.4), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, (task, base) in zip(axes[0], bases.items()):
        axis.axhline(base["success_rate"], color="black", linestyle="--", linewidth=1, label="base")
        for number, (method, policy) in enumerate(curves):
            by_step: dict[int, list[float]] = {}
            colour = f"C{number % 10}"
            for run in runs:
                if (run["task"], run["method"]) != (task, method):
                    continue
                steps = [point["grid"] for point in run["points"]]
                rates = [point[policy]["success_rate"] for point in run["points"]]
                axis.plot(steps, rates, color=colour, linewidth=0.8, alpha=0.5)
                for step, rate in zip(steps, rates, strict=True):
                    by_step.setdefault(step, []).append(rate)
            if by_step:
                medians = [statistics.median(by_step[step]) for step in sorted(by_step)]
                label = f"{METHOD_NAMES.get(method, method)}, {POLICIES[policy]}"
                axis.plot(sorted(by_step), medians, color=colour, linewidth=2.2, label=label)
        axis.set(title=task, xlabel="environment steps", ylim=(0, 1.03))
    axes[0][0].set_ylabel("success rate")
    # Beside the panels: a rival's curve may lie anywhere.
    shown = {label: line for axis in axes[0] for line, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(list(shown.values()), list(shown), loc="outside lower center", ncols=3, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write_samples(
    output: Path, runs: Sequence[dict[str, Any]], bases: dict[str, dict[str, Any]], env_steps: int
) -> str:
    """Write samples.md, samples.json and samples.png; return the table."""
    entries = summarise(runs, bases)
    text = samples_table(entries, bases, env_steps)
    write_json(output / "samples.json", {"bases": bases, "methods": entries})
    (output / "samples.md").write_text(text, encoding="utf-8")
    plot(output / "samples.png", runs, bases)
    return text
