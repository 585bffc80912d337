"""The figures of a comparison."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trimtab.recipes.compare.measure import SUCCESS, measure_in
from trimtab.recipes.compare.summary import label


def plot_curves(path: Path, runs: Sequence[dict[str, Any]], entries: Sequence[dict[str, Any]]) -> None:
    """Evaluations against environment steps: a panel per task, a thin line per seed, a thick one of the mean.

    What takes no environment steps is a level line; a search that ends at one point is a mark.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(entry["task"] for entry in entries))
    labels = list(dict.fromkeys(label(entry) for entry in entries))
    size = (7.0 * len(tasks), 5.0 + 0.2 * -(-len(labels) // 3))
    figure = Figure(figsize=size, layout="constrained")
    panels: dict[str, Any] = dict(zip(tasks, figure.subplots(1, len(tasks), squeeze=False)[0]))
    measures = {entry["task"]: measure_in(entry) for entry in entries}
    shown: dict[str, Any] = {}
    for entry in entries:
        mine = [r for r in runs if (r["task"], r["method"]) == (entry["task"], entry["method"])]
        colour = colormaps["tab20"](labels.index(label(entry)) % 20)
        shown[label(entry)] = _draw(panels[entry["task"]], entry, mine, colour)
    for task, axis in panels.items():
        axis.set(title=task, xlabel="environment steps", ylabel=f"{measures[task].name}, evaluation episodes")
        axis.set_xlim(left=0)
        if measures[task] is SUCCESS:
            axis.set_ylim(0, 1.03)
    # Beside the panels: a curve may lie anywhere.
    figure.legend(list(shown.values()), list(shown), loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=110)


def _draw(axis: Any, entry: dict[str, Any], runs: Sequence[dict[str, Any]], colour: Any) -> Any:
    """Draw the runs of one row; returns what stands for it in the legend."""
    measure = measure_in(entry)
    if max(entry["env_steps"]) == 0:
        style = {"color": "black", "linestyle": "--"} if entry["method"] == "base" else {"linestyle": ":"}
        return axis.axhline(entry[measure.name][measure.mean], **{"color": colour, "linewidth": 1.3, **style})
    by_step: dict[int, list[float]] = {}
    for run in runs:
        curve = [(point["grid"], point[entry["policy"]][measure.mean]) for point in run["points"]]
        axis.plot(*zip(*curve), color=colour, linewidth=0.8, alpha=0.5)
        for step, rate in curve:
            by_step.setdefault(step, []).append(rate)
    if all(len(run["points"]) == 1 for run in runs):
        ends = [(step, rate) for step, rates in by_step.items() for rate in rates]
        return axis.plot(*zip(*ends), "D", color=colour, markersize=5)[0]
    means = [(step, statistics.fmean(rates)) for step, rates in sorted(by_step.items())]
    return axis.plot(*zip(*means), color=colour, linewidth=2, marker=".")[0]


def plot_aggregates(path: Path, aggregates: Sequence[dict[str, Any]]) -> None:
    """A panel for each aggregate of ``aggregate``: a mark per method, with its 95 % interval."""
    from matplotlib.figure import Figure

    titles = {
        "iqm": "inter-quartile mean of scores",
        "improvement": f"probability that {aggregates[0]['improved']} scores higher",
        "share": f"share of the steps of {aggregates[0]['reach']} to its final level",
    }
    shown = [name for name in titles if any(name in entry for entry in aggregates)]
    figure = Figure(figsize=(4.6 * len(shown) + 1.5, 1.2 + 0.35 * len(aggregates)), layout="constrained")
    axes = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for axis, name in zip(axes, shown, strict=True):
        for y, entry in enumerate(aggregates):
            if (value := entry.get(name)) is not None:
                low, high = entry[f"{name}_ci95"] or (value, value)
                axis.plot(
                    [low, axis.get_xlim()[1] if high is None else high],
                    [y, y],
                    color="tab:blue",
                    lw=5,
                    alpha=0.4,
                )
                axis.plot(value, y, "o", color="tab:blue")
        axis.set(title=titles[name], xlim=(min(0.0, axis.get_xlim()[0]), None))
    if "improvement" in shown:
        axes[shown.index("improvement")].axvline(0.5, color="black", linestyle="--", linewidth=0.8)
    axes[0].set_yticks(range(len(aggregates)), [label(entry) for entry in aggregates])
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=110)
