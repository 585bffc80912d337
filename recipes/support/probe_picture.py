"""The picture of a probe: what noise does to the chunk, and to success."""

from __future__ import annotations

from pathlib import Path
from textwrap import fill
from typing import Any

from trimtab.adapters.steerability import Steerability
from trimtab.recipes.support.reporting import NAMES


def plot_probe(
    path: Path,
    measured: Steerability,
    success: dict[str, dict[str, Any]],
    constants: list[dict[str, Any]],
    title: str,
) -> None:
    """Draw spread by chunk step, the effect of noise rows and dimensions, and success by noise source."""
    from matplotlib.figure import Figure

    columns = 4 if success else 3
    figure = Figure(figsize=(4.2 * columns, 3.8), layout="constrained")
    axes = figure.subplots(1, columns)
    figure.suptitle(fill(title, 40 * columns))
    axis, dims = axes[0], measured.spread.shape[1]
    lines = axis.plot(measured.spread, linewidth=1.2, alpha=0.8)
    axis.set(xlabel="step of the chunk", ylabel="standard deviation over noises", title="spread of actions")
    if dims <= 8:
        axis.legend(lines, [f"action {dim}" for dim in range(dims)], fontsize=7)
    axis = axes[1]
    if len(measured.row_effect):
        extent = (-0.5, measured.row_effect.shape[1] - 0.5, measured.row_blocks[-1] - 0.5, -0.5)
        image = axis.imshow(measured.row_effect, aspect="auto", extent=extent, cmap="viridis")
        figure.colorbar(image, ax=axis, label="change of the action")
        axis.set(xlabel="step of the chunk", ylabel="noise row", title="which noise row moves which step")
    else:
        axis.text(0.5, 0.5, "the noise has no rows", ha="center", va="center")
        axis.set_axis_off()
    axis, effect = axes[2], measured.column_effect
    colours = ["tab:red" if dim in measured.inert_columns else "tab:blue" for dim in range(len(effect))]
    axis.bar(range(len(effect)), effect, color=colours)
    axis.set(
        xlabel="noise dimension (red: no effect)", ylabel="change of the chunk", title="noise dimensions"
    )
    if success:
        _plot_success(axes[3], success, constants)
    figure.savefig(path, dpi=120)


def _plot_success(axis: Any, success: dict[str, dict[str, Any]], constants: list[dict[str, Any]]) -> None:
    reported = all(entry["success_rate"] is not None for entry in success.values())
    value, interval = ("success_rate", "ci95") if reported else ("return_mean", "return_ci95")
    bars = [(NAMES.get(name, name), entry[value], entry[interval]) for name, entry in success.items()]
    for number, entry in enumerate(constants, 1):
        bars.append((f"constant {number}", entry["successes"] / entry["episodes"], entry["ci95"]))
    names, means, intervals = zip(*bars)
    errors = [[max(m - low, 0), max(high - m, 0)] for m, (low, high) in zip(means, intervals)]
    colours = ["tab:green"] * len(success) + ["tab:gray"] * len(constants)
    axis.barh(range(len(bars)), means, xerr=list(zip(*errors)), color=colours, alpha=0.8, capsize=2)
    axis.set_yticks(range(len(bars)), names, fontsize=7)
    axis.invert_yaxis()
    what = "success rate" if reported else "return"
    axis.set(xlabel=f"{what} (95 % interval)", title=f"{what} by noise")
    if reported:
        axis.set_xlim(0, 1)
