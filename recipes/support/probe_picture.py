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
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = 4 if success else 3
    figure, axes = plt.subplots(1, columns, figsize=(4.2 * columns, 3.8), layout="constrained")
    figure.suptitle(fill(title, 40 * columns))
    axis = axes[0]
    for dim in range(measured.spread.shape[1]):
        label = f"action {dim}" if measured.spread.shape[1] <= 8 else None
        axis.plot(measured.spread[:, dim], linewidth=1.2, alpha=0.8, label=label)
    axis.set(xlabel="step of the chunk", ylabel="standard deviation over noises", title="spread of actions")
    axis.set_ylim(bottom=0)
    if measured.spread.shape[1] <= 8:
        axis.legend(fontsize=7)
    axis = axes[1]
    if len(measured.row_effect):
        last = measured.row_blocks[-1]
        extent = (-0.5, measured.row_effect.shape[1] - 0.5, last - 0.5, -0.5)
        image = axis.imshow(measured.row_effect, aspect="auto", extent=extent, cmap="viridis")
        figure.colorbar(image, ax=axis, label="change of the action")
        axis.set(xlabel="step of the chunk", ylabel="noise row", title="which noise row moves which step")
    else:
        axis.text(0.5, 0.5, "the noise has no rows", ha="center", va="center")
        axis.set_axis_off()
    axis = axes[2]
    effect, inert = measured.column_effect, set(measured.inert_columns)
    colours = ["tab:red" if dim in inert else "tab:blue" for dim in range(len(effect))]
    axis.bar(range(len(effect)), effect, color=colours)
    axis.set(
        xlabel="noise dimension (red: no effect)", ylabel="change of the chunk", title="noise dimensions"
    )
    if success:
        _success(axes[3], success, constants)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _success(axis: Any, success: dict[str, dict[str, Any]], constants: list[dict[str, Any]]) -> None:
    told = all(entry["success_rate"] is not None for entry in success.values())
    value, interval = ("success_rate", "ci95") if told else ("return_mean", "return_ci95")
    bars = [(NAMES.get(name, name), entry[value], entry[interval]) for name, entry in success.items()]
    for index, entry in enumerate(constants):
        rate = entry["successes"] / entry["episodes"]
        bars.append((f"constant {index + 1}", rate, entry["ci95"]))
    positions = range(len(bars))
    rates = [rate for _, rate, _ in bars]
    errors = [[max(rate - ci[0], 0) for _, rate, ci in bars], [max(ci[1] - rate, 0) for _, rate, ci in bars]]
    colours = ["tab:green"] * len(success) + ["tab:gray"] * len(constants)
    axis.barh(positions, rates, xerr=errors, color=colours, alpha=0.8, capsize=2)
    axis.set_yticks(positions, [name for name, _, _ in bars], fontsize=7)
    axis.invert_yaxis()
    what = "success rate" if told else "return"
    axis.set(xlabel=f"{what} (95 % interval)", title=f"{what} by noise")
    if told:
        axis.set_xlim(0, 1)
