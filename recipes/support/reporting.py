"""What a run leaves behind: metrics.jsonl, tables, curves and videos."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trimtab.rl.evaluation import Evaluation
from trimtab.rl.statistics import wilson_interval

NAMES = {
    "base": "base policy",
    "zero_noise": "zero noise",
    "repeated_noise": "repeated noise",
    "prior_noise": "draws from the prior",
    "constant_noise": "best constant noise",
    "steered": "steered",
    "fine_tuned": "fine-tuned",
}
# What tables of `trimtab compare` and `trimtab bench` call a method, where its name alone would mislead.
METHOD_NAMES = {
    "dsrl_sac_paper": "DSRL-SAC, paper's settings",
    "dsrl_sac_paper_short": "DSRL-SAC, paper's settings, short warm-up",
}


NOT_REPORTED = "not reported"
MIN_WINDOW = 15  # episodes behind a point of the success curve


class MetricsWriter:
    """Appends one JSON object per line; each line reaches the file whole.

    Args:
        path: the file; what it held is replaced.
        keep: bytes of it to keep instead, when a run goes on from a checkpoint.

    Attributes:
        lines: all of the run's lines.
    """

    def __init__(self, path: Path, keep: int = 0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.lines: list[dict[str, Any]] = []
        held = path.read_bytes()[:keep] if keep and path.is_file() else b""
        self.lines = [json.loads(line) for line in held.decode("utf-8", "replace").splitlines() if line]
        if held:
            os.truncate(path, len(held))
        self._file = open(path, "a" if held else "w", encoding="utf-8")  # noqa: SIM115 - `__exit__` closes it

    def place(self) -> int:
        """Length of the file, which now is on the disk."""
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


def outcomes(evaluations: dict[str, Evaluation]) -> dict[str, str]:
    """Each episode's outcome, 1 or 0, in the order of the seeds: what a paired test needs."""
    return {name: "".join(str(int(won)) for won in e.successes) for name, e in evaluations.items()}


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
    low, high = summary["return_ci95"]
    return f"{summary['return_mean']:.4g} [{low:.4g}, {high:.4g}]"


def table(results: dict[str, dict[str, Any]], returns: bool = False) -> str:
    """A table of evaluation summaries with counts and 95 % Wilson intervals.

    Args:
        results: summaries by policy.
        returns: show the environment's own return, too; it always is where success is not reported.
    """
    returns = returns or any(entry["success_rate"] is None for entry in results.values())
    rows = [["policy", "success", "95 % interval", "episodes", "mean steps"]]
    rows[0] += ["return [95 % interval]"] if returns else []
    for name, entry in results.items():
        if entry["success_rate"] is None:
            success = [NOT_REPORTED, "", f"{entry['episodes']}"]
        else:
            low, high = entry["ci95"]
            success = [
                f"{100 * entry['success_rate']:.1f} %",
                f"{100 * low:.1f} - {100 * high:.1f} %",
                f"{entry['successes']}/{entry['episodes']}",
            ]
        more = [return_text(entry)] if returns else []
        rows.append([NAMES.get(name, name), *success, f"{entry['mean_steps']:.0f}", *more])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths)))
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def plot_curve(
    path: Path, lines: Sequence[dict[str, Any]], results: dict[str, dict[str, Any]], title: str
) -> None:
    """Draw success while learning, with the evaluated policies as levels, and the critic's calibration."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(7.2, 6.0), sharex=True, height_ratios=(3, 1.2), layout="constrained"
    )
    # The first episodes to end are the short ones, which are the successes: leave those lines out.
    whole = [line for line in lines if line["success_window"] >= MIN_WINDOW] or list(lines)
    told = all(entry["success_rate"] is not None for entry in results.values())
    shown = "success_rate" if told else "return_mean"
    whole = [line for line in whole if line.get(shown) is not None]
    steps = np.array([line["env_steps"] for line in whole])
    rate = np.array([line[shown] for line in whole])
    count = np.array([line["success_window"] for line in whole])
    if told and whole:
        band = np.array(
            [wilson_interval(round(r * n), n) if n else (0.0, 1.0) for r, n in zip(rate, count, strict=True)]
        )
        top.fill_between(steps, band[:, 0], band[:, 1], color="tab:blue", alpha=0.15, linewidth=0)
    top.plot(
        steps,
        rate,
        color="tab:blue",
        linewidth=2,
        label=f"while learning (last {max(count, default=0)} episodes)",
    )
    colours = {
        "base": "tab:gray",
        "zero_noise": "tab:olive",
        "constant_noise": "tab:brown",
        "steered": "tab:green",
    }
    for name, entry in results.items():
        if entry.get(shown) is None:
            continue
        level = f"{100 * entry[shown]:.1f} % of" if told else f"{entry[shown]:.4g}, mean of"
        top.axhline(
            entry[shown],
            color=colours.get(name, "black"),
            linestyle="--",
            linewidth=1.4,
            label=f"{NAMES.get(name, name)}: {level} {entry['episodes']}",
        )
    warm = [line["env_steps"] for line in lines if line["acting"] == "untrained"]
    if warm:
        for axis in (top, bottom):
            axis.axvspan(0, warm[-1], color="black", alpha=0.05, linewidth=0)
        place = {"ha": "center", "va": "bottom", "transform": top.get_xaxis_transform()}
        top.text(warm[-1] / 2, 0.935, "untrained", fontsize=8, **place)
    top.set(ylabel="success rate" if told else "return", title=title)
    if told:
        top.set_ylim(0, 1.08)
    top.legend(loc="center right", fontsize=8)
    learnt = [line for line in lines if "q_mean" in line]
    bottom.plot(
        [line["env_steps"] for line in learnt],
        [line["q_mean"] for line in learnt],
        label="mean Q",
        color="C1",
    )
    calibrated = [line for line in lines if "calibration_bias" in line]
    bottom.plot(
        [line["env_steps"] for line in calibrated],
        [line["calibration_bias"] for line in calibrated],
        label="Q minus return",
        color="C3",
    )
    bottom.axhline(0, color="black", linewidth=0.6)
    bottom.set(xlabel="environment steps", ylabel="critic")
    bottom.legend(loc="lower right", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write_grid_video(path: Path, evaluation: Evaluation, seeds: Sequence[int], fps: int) -> bool:
    """Write the recorded episodes of ``seeds`` side by side; a green border marks success.

    Returns:
        Whether there was anything to write.
    """
    from lerobot.utils.io_utils import write_video

    recorded = [(seed, evaluation.frames.get(seed, [])) for seed in seeds]
    recorded = [(seed, frames) for seed, frames in recorded if frames]
    if not recorded:
        return False
    success = dict(zip(evaluation.seeds, evaluation.successes, strict=True))
    length = max(len(frames) for _, frames in recorded)
    columns = min(4, len(recorded))
    rows = -(-len(recorded) // columns)
    height, width = recorded[0][1][0].shape[:2]
    video = []
    for t in range(length + fps // 2):
        canvas = np.zeros((rows * height, columns * width, 3), dtype=np.uint8)
        for index, (seed, frames) in enumerate(recorded):
            tile = frames[min(t, len(frames) - 1)].copy()
            if t >= len(frames) - 1 and evaluation.reported:
                colour = (40, 180, 60) if success[seed] else (200, 50, 40)
                tile[:6], tile[-6:], tile[:, :6], tile[:, -6:] = colour, colour, colour, colour
            y, x = divmod(index, columns)
            canvas[y * height : (y + 1) * height, x * width : (x + 1) * width] = tile
        video.append(canvas)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, video, fps)
    return True
