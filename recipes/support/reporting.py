"""What a run leaves behind: metrics.jsonl, tables, curves and videos."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np

from trimtab.adapters.steerability import Steerability
from trimtab.rl.evaluation import Evaluation
from trimtab.rl.runs.threads import machine_record
from trimtab.rl.statistics import p_below, wilson_interval

NAMES = {
    "base": "base policy",
    "zero_noise": "zero noise",
    "repeated_noise": "repeated noise",
    "prior_noise": "draws from the prior",
    "constant_noise": "best constant noise",
    "steered": "steered",
    "fine_tuned": "fine-tuned",
}
COLOURS = {
    "base": "tab:gray",
    "zero_noise": "tab:olive",
    "constant_noise": "tab:brown",
    "steered": "tab:green",
}
NOT_REPORTED = "not reported"
MIN_WINDOW = 15  # episodes behind a point of the success curve
FPS = 20


class MetricsWriter:
    """Appends one JSON object per line to ``path``, of which it keeps the first ``keep`` bytes.

    ``lines`` are all of the run's.
    """

    def __init__(self, path: Path, keep: int = 0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = path.read_bytes()[:keep] if keep and path.is_file() else b""
        self.lines = [json.loads(line) for line in kept.decode("utf-8", "replace").splitlines() if line]
        if kept:
            os.truncate(path, len(kept))
        self._file = open(path, "a" if kept else "w", encoding="utf-8")  # noqa: SIM115 - `__exit__` closes it

    def offset(self) -> int:
        """Length of the file in bytes, which now is on the disk."""
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def __call__(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def summaries(evaluations: dict[str, Evaluation]) -> dict[str, dict[str, Any]]:
    """The JSON form of evaluations."""
    return {name: evaluation.summary() for name, evaluation in evaluations.items()}


def results_of(config: Any, evaluations: dict[str, Evaluation], **more: Any) -> dict[str, Any]:
    """Content of results.json: ``more``, and how the policies of a command did, and on which episodes."""
    return {
        "policies": summaries(evaluations),
        # 1 or 0 for each episode, in the order of the seeds: what a paired test needs. With a person the
        # scenes of two policies differ.
        "paired": not getattr(config.env, "attended", False),
        "outcomes": {n: "".join(str(int(won)) for won in e.successes) for n, e in evaluations.items()},
        "returns": {n: e.returns.tolist() for n, e in evaluations.items() if e.returns is not None},
        "env": config.env and {"type": config.env.type, "task": config.env.task},
        "seed": config.seed,
        "evaluation_seeds": [config.eval.seeds[0], config.eval.seeds[-1]],
        **more,
        "machine": machine_record(),
    }


def rate_text(summary: dict[str, Any]) -> str:
    """``49.0 % [42.2, 55.9] (98/200)``: a success rate with its 95 % interval and counts."""
    if summary["success_rate"] is None:
        return f"success {NOT_REPORTED}, return {return_text(summary)}"
    low, high = summary["ci95"]
    return (
        f"{100 * summary['success_rate']:.1f} % [{100 * low:.1f}, {100 * high:.1f}] "
        f"({summary['successes']}/{summary['episodes']})"
    )


def return_text(summary: dict[str, Any]) -> str:
    """``12.3 [10.1, 14.2]``: the mean of the environment's own return with its 95 % bootstrap interval."""
    if summary.get("return_mean") is None:
        return "not kept"
    limits = " [{:.4g}, {:.4g}]".format(*summary["return_ci95"]) if summary["return_ci95"] else ""
    return f"{summary['return_mean']:.4g}{limits}"


def table(results: dict[str, dict[str, Any]], returns: bool = False) -> str:
    """A table of evaluation summaries by policy, with counts and 95 % Wilson intervals.

    ``returns`` shows the environment's own return, too; it always is where success is not reported.
    """
    returns = returns or any(entry["success_rate"] is None for entry in results.values())
    rows = [["policy", "success", "95 % interval", "episodes", "mean steps", "return [95 % interval]"]]
    for name, entry in results.items():
        success = [NOT_REPORTED, "", f"{entry['episodes']}"]
        if entry["success_rate"] is not None:
            low, high = entry["ci95"]
            success = [
                f"{100 * entry['success_rate']:.1f} %",
                f"{100 * low:.1f} - {100 * high:.1f} %",
                f"{entry['successes']}/{entry['episodes']}",
            ]
        rows.append([NAMES.get(name, name), *success, f"{entry['mean_steps']:.0f}", return_text(entry)])
    if not returns:
        rows = [row[:-1] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join([name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells, widths[1:]))])
        for name, *cells in rows
    )


def doubt(results: dict[str, dict[str, Any]]) -> str:
    """A line that says so where the steered policy is not shown to be better than the base; else nothing.

    By Fisher's exact test of their successes, one-sided at 5 %; without success by the intervals of their
    returns.
    """
    base, steered = results.get("base"), results.get("steered")
    if not base or not steered:
        return ""
    if base["success_rate"] is not None and steered["success_rate"] is not None:
        counts = [one[name] for one in (base, steered) for name in ("successes", "episodes")]
        p = p_below(*counts)
        better, why = p <= 0.05, f"p = {p:.2g}, Fisher's exact test, one-sided"
    else:
        lows, highs = zip(*(one.get("return_ci95") or (0.0, 0.0) for one in (base, steered)))
        better, why = lows[1] > highs[0], "their 95 % intervals meet"
        if min(base["episodes"], steered["episodes"]) < 2:
            better, why = False, "one episode has no interval"
    mend = "more steps or episodes, another --seed, and what `trimtab probe` says of the base may help"
    return "" if better else f"steered is NOT shown to be better than the base ({why}): {mend}\n"


def plot_curve(
    path: Path, lines: Sequence[dict[str, Any]], results: dict[str, dict[str, Any]], title: str
) -> None:
    """Draw success (or return) while learning, evaluated policies as levels, and the critic's calibration."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 6.0), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1.2))
    reported = all(entry["success_rate"] is not None for entry in results.values())
    measure = "success_rate" if reported else "return_mean"
    # The first episodes to end are the short ones, which are the successes: leave those lines out.
    drawn = [line for line in lines if line["success_window"] >= MIN_WINDOW] or list(lines)
    drawn = [line for line in drawn if line.get(measure) is not None]
    steps, rates, counts = ([line[key] for line in drawn] for key in ("env_steps", measure, "success_window"))
    if reported and drawn:
        bands = [wilson_interval(round(r * n), n) if n else (0.0, 1.0) for r, n in zip(rates, counts)]
        top.fill_between(steps, *zip(*bands), color="tab:blue", alpha=0.15, linewidth=0)
    label = f"while learning (last {max(counts, default=0)} episodes)"
    top.plot(steps, rates, color="tab:blue", linewidth=2, label=label)
    for name, entry in results.items():
        if entry.get(measure) is not None:
            level = f"{100 * entry[measure]:.1f} % of" if reported else f"{entry[measure]:.4g}, mean of"
            label = f"{NAMES.get(name, name)}: {level} {entry['episodes']}"
            colour = COLOURS.get(name, "black")
            top.axhline(entry[measure], color=colour, linestyle="--", linewidth=1.4, label=label)
    warm = [line["env_steps"] for line in lines if line["acting"] == "untrained"]
    for axis in (top, bottom) if warm else ():
        axis.axvspan(0, warm[-1], color="black", alpha=0.05, linewidth=0, label="untrained")
    top.set(ylabel="success rate" if reported else "return", title=title)
    if reported:
        top.set_ylim(0, 1.08)
    top.legend(loc="center right", fontsize=8)
    for key, label, colour in (("q_mean", "mean Q", "C1"), ("calibration_bias", "Q minus return", "C3")):
        points = [(line["env_steps"], line[key]) for line in lines if key in line]
        bottom.plot(*np.reshape(points, (-1, 2)).T, label=label, color=colour)
    bottom.axhline(0, color="black", linewidth=0.6)
    bottom.set(xlabel="environment steps", ylabel="critic")
    bottom.legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=120)


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


def write_grid_video(path: Path, evaluation: Evaluation) -> None:
    """Write what an evaluation has recorded, if anything, side by side; a green border marks success."""
    from lerobot.utils.io_utils import write_video

    won = dict(zip(evaluation.seeds, evaluation.successes, strict=True))
    recorded = [(won[seed], frames) for seed, frames in sorted(evaluation.frames.items())]
    if not recorded:
        return
    columns, video = min(4, len(recorded)), []
    for t in range(max(len(frames) for _, frames in recorded) + FPS // 2):
        tiles = []
        for success, frames in recorded:
            tile = frames[min(t, len(frames) - 1)].copy()
            if t >= len(frames) - 1 and evaluation.reported:
                colour = (40, 180, 60) if success else (200, 50, 40)
                tile[:6] = tile[-6:] = tile[:, :6] = tile[:, -6:] = colour
            tiles.append(tile)
        tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % columns)
        rows = [np.hstack(tiles[start : start + columns]) for start in range(0, len(tiles), columns)]
        video.append(np.vstack(rows))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, video, FPS)


def waits(last: dict[str, Any], simulators: str, workers: int, most: int) -> list[str]:
    """What waited for what while training, by the last line of the metrics; and whether simulators bound it.

    ``simulators``: what takes their time, empty for a robot, whose time is its own. They may use ``workers``
    processes, and could use ``most``: there are no more environments, or no more cores.
    """
    names = {
        "learner_waits": "the learner waited for the environments",
        "envs_wait": "the environments waited for the learner",
        "denoise": "both waited for the base",
        "processes_wait": "the processes waited for each other",
    }
    shares = {said: last.get(f"seconds_share/{name}") for name, said in names.items()}
    told = ", ".join(f"{said} {share:.0%}" for said, share in shares.items() if share is not None)
    lines = [f"of {last['seconds_total']:.0f} s of training: {told}"] if told else []
    if simulators and (last.get("seconds_share/learner_waits") or 0.0) > 0.5:
        spread = f": --machine.workers={most} spreads it over more cores (now {workers})"
        full = f", in {most} processes, as many as --num_envs and the cores allow"
        lines.append(f"{simulators} bounds this run{spread if workers < most else full}")
    return lines
