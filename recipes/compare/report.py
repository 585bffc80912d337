"""The report of a comparison: Markdown, JSON, a figure, and one HTML file with everything in it."""

from __future__ import annotations

import base64
import html
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trimtab.recipes.compare.summary import LEVELS
from trimtab.recipes.support.reporting import METHOD_NAMES, rate_text, write_json

POLICIES = {"policy": "", "actor": "", "acting": ", best of K by the critic"}
HEADER = [
    "method",
    "success",
    "gain over the base",
    "p (McNemar)",
    *(f"steps (episodes) to {100 * level:.0f} %" for level in LEVELS),
    "weights trained",
    "artefact, MB",
    "peak memory, MB",
    "wall-clock, s",
    "CPU, s",
    "other tasks, in use",
    "other tasks, put aside",
]
NOTES = (
    "Success: counts over all seeds with the 95 % Wilson interval; seeds share episodes, so it is about "
    "these episodes and seeds. Gain: mean over the seeds on the same episodes as the base (with one seed, "
    "the 95 % interval of Bonett and Price); p: McNemar's exact test, two-sided, the largest of the seeds'. "
    "Steps to a level: environment steps to the first evaluation from which this and all later ones reach "
    "it, and training episodes until then; median of the seeds. Memory, wall-clock and CPU: means over the "
    "seeds; times are of training alone, memory is the main process' peak, the base and its libraries "
    "included. Other tasks: change of success on the base's other tasks, the same episodes before and "
    "after; in use: the result acts there too; put aside: what is left of the base without it, episode by "
    "episode (a LoRA adapter can be put aside as well, if something tells the task; that is the base "
    "itself, and was not run again)."
)


def label(entry: dict[str, Any]) -> str:
    """The name of a row."""
    method = METHOD_NAMES.get(entry["method"], entry["method"])
    own = entry["policy"] == "actor" and entry.get("has_acting")
    return method + (", distilled actor" if own else POLICIES.get(entry["policy"], f", {entry['policy']}"))


def _number(value: float | None, form: str = ".0f") -> str:
    return "-" if value is None else format(value, form)


def _points(value: float) -> str:
    return f"{100 * value:+.1f}"


def _elsewhere(found: dict[str, Any] | None) -> str:
    if found is None:
        return "-"
    flips = "no episode differs" if not found["flipped"] else f"{found['flipped']}/{found['episodes']} differ"
    return f"{_points(found['change'])} points ({flips})"


def _level(entry: dict[str, Any], level: float) -> str:
    found = (entry["to_level"] or {}).get(f"{100 * level:.0f}")
    if found is None:
        return "-"
    if max(entry["env_steps"]) == 0:  # costs no steps
        return "0" if found["steps_median"] == 0 else "-"
    if found["steps_median"] is None:
        return f"> {max(entry['env_steps']):,}"
    episodes = found["episodes_median"]
    return f"{found['steps_median']:,.0f}" + ("" if episodes is None else f" ({episodes:.0f})")


def cells(entry: dict[str, Any]) -> list[str]:
    """A row of the table."""
    gain, p = "-", "-"
    paired = entry["against_base"]
    if paired:
        gain = f"{_points(paired['difference'])} points"
        if paired["ci95"]:
            gain += " [{}, {}]".format(*(_points(limit) for limit in paired["ci95"]))
        worst = max(paired["p"])
        p = "< 0.0001" if worst < 1e-4 else f"{worst:.4f}"
    weights = entry["trainable_parameters"]
    return [
        label(entry),
        rate_text(entry["success"]),
        gain,
        p,
        *(_level(entry, level) for level in LEVELS),
        _number(weights, ","),
        _number(entry["artefact_mb"], ".2f"),
        _number(entry["peak_mb"]),
        _number(entry["wall_seconds"]),
        _number(entry["cpu_seconds"]),
        _elsewhere(entry["left_on"]),
        _elsewhere(entry["switched_off"]),
    ]


def by_task(entries: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The entries of each task, in order."""
    found: dict[str, list[dict[str, Any]]] = {}
    for entry in entries:
        found.setdefault(entry["task"], []).append(entry)
    for rows in found.values():
        chosen = {row["method"] for row in rows if row["policy"] == "acting"}
        for row in rows:
            row["has_acting"] = row["method"] in chosen
    return found


def markdown(title: str, facts: Sequence[str], entries: Sequence[dict[str, Any]]) -> str:
    """The tables."""
    lines = [f"# {title}", "", *(f"- {fact}" for fact in facts), ""]
    for task, rows in by_task(entries).items():
        lines += [f"## {task}", "", f"| {' | '.join(HEADER)} |", "|" + "---|" * len(HEADER)]
        lines += [f"| {' | '.join(cells(row))} |" for row in rows]
        lines.append("")
    return "\n".join([*lines, NOTES, "", "![success against environment steps](curve.png)", ""])


def plot(path: Path, runs: Sequence[dict[str, Any]], entries: Sequence[dict[str, Any]]) -> None:
    """Success against environment steps: a panel per task, the mean of the seeds, a band from worst to best.

    What takes no environment steps is a level line; a search that ends at one point is a mark.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks = by_task(entries)
    figure, axes = plt.subplots(
        1, len(tasks), figsize=(7.0 * len(tasks), 5.0), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, (task, rows) in zip(axes[0], tasks.items()):
        for number, row in enumerate(rows):
            mine = [r for r in runs if (r["task"], r["method"]) == (task, row["method"])]
            colour = "black" if row["method"] == "base" else plt.get_cmap("tab20")(number % 20)
            _draw(axis, row, mine, colour)
        axis.set(title=task, xlabel="environment steps", ylim=(0, 1.03))
        axis.set_xlim(left=0)
        axis.legend(fontsize=7, loc="lower right")
    axes[0][0].set_ylabel("success rate on the evaluation episodes")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw(axis: Any, row: dict[str, Any], runs: Sequence[dict[str, Any]], colour: Any) -> None:
    policy, name = row["policy"], label(row)
    if max(row["env_steps"]) == 0:
        style = "--" if row["method"] == "base" else ":"
        axis.axhline(row["success"]["success_rate"], color=colour, linestyle=style, linewidth=1.3, label=name)
        return
    by_step: dict[int, list[float]] = {}
    for run in runs:
        for point in run["points"]:
            by_step.setdefault(point["grid"], []).append(point[policy]["success_rate"])
    if all(len(run["points"]) == 1 for run in runs):
        steps = [run["points"][0]["env_steps"] for run in runs]
        rates = [run["points"][0][policy]["success_rate"] for run in runs]
        axis.plot(steps, rates, "D", color=colour, markersize=5, label=name)
        return
    steps = sorted(by_step)
    axis.plot(
        steps,
        [statistics.fmean(by_step[s]) for s in steps],
        color=colour,
        linewidth=2,
        marker=".",
        label=name,
    )
    low, high = ([edge(by_step[s]) for s in steps] for edge in (min, max))
    axis.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)


STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 1200px; padding: 0 1rem }
table { border-collapse: collapse; font-size: 13px } .wide { overflow-x: auto }
th, td { border-bottom: 1px solid #ddd; padding: .35rem .6rem; text-align: right; vertical-align: top }
th:first-child, td:first-child { text-align: left; white-space: nowrap } th { background: #f5f5f5 }
img { max-width: 100% } figure { display: inline-block; margin: .5rem; width: 360px } video { width: 100% }
figcaption { font-size: 13px; color: #555 } .notes { color: #555; font-size: 13px }
"""


def _embedded(path: Path, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def page(
    title: str,
    facts: Sequence[str],
    entries: Sequence[dict[str, Any]],
    curve: Path,
    videos: Sequence[tuple[str, Path]],
) -> str:
    """The report as one HTML file that refers to no other.

    Args:
        title, facts, entries: as for ``markdown``.
        curve: the figure, PNG.
        videos: (caption, MP4).
    """
    escape = html.escape
    parts = [
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{escape(title)}</title>",
        f"<style>{STYLE}</style></head><body><h1>{escape(title)}</h1><ul>",
        *(f"<li>{escape(fact)}</li>" for fact in facts),
        "</ul>",
    ]
    for task, rows in by_task(entries).items():
        parts.append(f"<h2>{escape(task)}</h2><div class='wide'><table><thead><tr>")
        parts += [f"<th>{escape(name)}</th>" for name in HEADER]
        parts.append("</tr></thead><tbody>")
        for row in rows:
            parts.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells(row)) + "</tr>")
        parts.append("</tbody></table></div>")
    parts.append(f"<p class='notes'>{escape(NOTES)}</p><h2>Success against environment steps</h2>")
    parts.append(f"<img alt='success against environment steps' src='{_embedded(curve, 'image/png')}'>")
    if videos:
        parts.append("<h2>Videos</h2><p class='notes'>Green border: success; red: failure.</p>")
    for caption, path in videos:
        source = _embedded(path, "video/mp4")
        parts.append(
            f"<figure><video controls loop muted src='{source}'></video>"
            f"<figcaption>{escape(caption)}</figcaption></figure>"
        )
    return "\n".join([*parts, "</body></html>", ""])


def write_report(
    output: Path,
    title: str,
    facts: Sequence[str],
    runs: Sequence[dict[str, Any]],
    entries: Sequence[dict[str, Any]],
    videos: Sequence[tuple[str, Path]],
) -> str:
    """Write compare.md, compare.json, curve.png and report.html; return the Markdown."""
    text = markdown(title, facts, entries)
    write_json(output / "compare.json", {"title": title, "facts": list(facts), "methods": list(entries)})
    (output / "compare.md").write_text(text, encoding="utf-8")
    plot(output / "curve.png", runs, entries)
    (output / "report.html").write_text(
        page(title, facts, entries, output / "curve.png", videos), encoding="utf-8"
    )
    return text
