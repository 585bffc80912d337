"""The report of a comparison: Markdown, JSON, a figure, and one HTML file with everything in it."""

from __future__ import annotations

import base64
import html
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from trimtab.recipes.compare.measure import MEASURES, RETURN, SUCCESS, Measure
from trimtab.recipes.compare.summary import WINDOW, summarise
from trimtab.recipes.support.reporting import write_json

# Names in tables, where a method's own would mislead.
METHOD_NAMES = {
    "dsrl_sac_paper": "DSRL-SAC, paper's settings",
    "dsrl_sac_paper_short": "DSRL-SAC, paper's settings, short warm-up",
}
POLICIES = {"policy": "", "actor": "", "acting": ", best of K by the critic"}
SUCCESS_TEXT = """
Success: counts over all seeds with the 95 % Wilson interval. Seeds share episodes, so it is about these
episodes and seeds. Gain: mean over the seeds on the same episodes as the base (with one seed, the 95 %
interval of Bonett and Price). p: McNemar's exact test, two-sided, the largest of the seeds'. Steps to a
level: environment steps to the first evaluation from which this and all later ones reach it, and training
episodes until then; median of the seeds.
"""
RETURN_TEXT = """
Return: mean of the undiscounted return over the episodes of all seeds with its 95 % bootstrap interval over
episodes. Seeds share episodes, so it is about these episodes and seeds. Gain: mean over the seeds on the same
episodes as the base, with the 95 % bootstrap interval over these episodes. Above the base: environment steps
to the first evaluation from which the mean of this and all later ones lies above the base's interval (over
all of its episodes), and training episodes until then; median of the seeds.
"""
COST_TEXT = """
Memory, wall-clock and CPU: means over the seeds. Times are of training alone; memory is the main process'
peak, the base and its libraries included. Other tasks: change on tasks that were not trained, on the same
episodes before and after: when what was learnt acts there, and when the base acts without it. (A LoRA adapter
can be taken off as well, if something tells the task; that is the base itself, and was not run again.)
"""
DIPS_TEXT = """
While learning: windows are 50 consecutive training episodes within the first 10,000 environment steps. They
overlap. Below the base: significantly so by Fisher's exact test, one-sided 95 %, each window for itself, so
that a few of many are to be expected even without a dip.
"""
CURVE_TITLE = "evaluations against environment steps"


def measure_in(entry: dict[str, Any]) -> Measure:
    """What an entry of compare.json is judged by."""
    return MEASURES[entry.get("measure", SUCCESS.name)]


def notes(entries: Sequence[dict[str, Any]]) -> list[str]:
    """What the columns mean."""
    used = {measure_in(entry) for entry in entries}
    chosen = [(SUCCESS in used, SUCCESS_TEXT), (RETURN in used, RETURN_TEXT), (True, COST_TEXT)]
    return [" ".join(text.split()) for shown, text in (*chosen, (SUCCESS in used, DIPS_TEXT)) if shown]


def label(entry: dict[str, Any]) -> str:
    """The name of a row."""
    method = METHOD_NAMES.get(entry["method"], entry["method"])
    if entry["policy"] == "actor" and entry.get("has_acting"):
        return f"{method}, distilled actor"
    return method + POLICIES.get(entry["policy"], f", {entry['policy']}")


def _number(value: float | None, form: str = ".0f") -> str:
    return "-" if value is None else format(value, form)


def _elsewhere(measure: Measure, found: dict[str, Any] | None) -> str:
    if found is None:
        return "-"
    flips = "no episode differs" if not found["flipped"] else f"{found['flipped']}/{found['episodes']} differ"
    return f"{measure.change(found['change'])} ({flips})"


def _steps(entry: dict[str, Any], steps: float | None) -> str:
    return f"> {max(entry['env_steps']):,}" if steps is None else f"{steps:,.0f}"


def _level(entry: dict[str, Any], level: str) -> str:
    found = (entry["to_level"] or {}).get(level)
    if found is None:
        return "-"
    steps, episodes = found["steps_median"], found["episodes_median"]
    if max(entry["env_steps"]) == 0:  # costs no steps
        return "0" if steps == 0 else "-"
    return _steps(entry, steps) + ("" if None in (steps, episodes) else f" ({episodes:.0f})")


def _gain(measure: Measure, paired: dict[str, Any] | None) -> str:
    if not paired:
        return "-"
    limits = [measure.change(limit, unit=False) for limit in paired["ci95"] or ()]
    return measure.change(paired["difference"]) + (f" [{', '.join(limits)}]" if limits else "")


def row(entry: dict[str, Any]) -> dict[str, str]:
    """What the first table shows of an entry, by column."""
    measure, paired = measure_in(entry), entry["against_base"]
    found = {
        "method": label(entry),
        measure.name: measure.text(entry[measure.name]),
        "gain over the base": _gain(measure, paired),
    }
    if measure is SUCCESS:
        worst = max(paired["p"]) if paired else None
        found["p (McNemar)"] = "< 0.0001" if worst is not None and worst < 1e-4 else _number(worst, ".4f")
    return found | {
        **{f"steps (episodes) {said}": _level(entry, level) for level, said in measure.level_names.items()},
        "weights trained": _number(entry["trainable_parameters"], ","),
        "artefact, MB": _number(entry["artefact_mb"], ".2f"),
        "peak memory, MB": _number(entry["peak_mb"]),
        "wall-clock, s": _number(entry["wall_seconds"]),
        "CPU, s": _number(entry["cpu_seconds"]),
        "other tasks, by what was learnt": _elsewhere(measure, entry["other_tasks"]),
        "other tasks, by the base afterwards": _elsewhere(measure, entry["base_afterwards"]),
    }


def learning_row(entry: dict[str, Any]) -> dict[str, str]:
    """What the second table shows of an entry that takes environment steps."""
    measure, last = measure_in(entry), entry["last_point"]
    level, said = list(measure.level_names.items())[-1]
    found = {
        "while learning": label(entry),
        f"steps {said}, each seed": ", ".join(_steps(entry, n) for n in entry["to_level"][level]["steps"]),
        f"{measure.name} at the last evaluation": measure.text(last) if last else "-",
    }
    if measure is SUCCESS:
        dips = entry["dips"] or []
        lowest = ", ".join("{lowest:.2f}".format(**dip) if dip else "-" for dip in dips)
        below = ", ".join("{below}/{windows}".format(**dip) if dip else "-" for dip in dips)
        found[f"lowest window of {WINDOW} training episodes, each seed"] = lowest or "-"
        found["windows below the base"] = below or "-"
    return found


def tables(entries: Sequence[dict[str, Any]]) -> Iterator[tuple[str, list[list[list[str]]]]]:
    """Each task with its tables: rows of cells, the first of them the header."""
    for task in dict.fromkeys(entry["task"] for entry in entries):
        mine = [entry for entry in entries if entry["task"] == task]
        learning = [learning_row(one) for one in mine if max(one["env_steps"]) and one["to_level"]]
        found = [rows for rows in ([row(one) for one in mine], learning) if rows]
        yield task, [[list(rows[0]), *(list(cells.values()) for cells in rows)] for rows in found]


def markdown(title: str, facts: Sequence[str], entries: Sequence[dict[str, Any]]) -> str:
    """The tables."""
    lines = [f"# {title}", "", *(f"- {fact}" for fact in facts), ""]
    for task, found in tables(entries):
        lines += [f"## {task}", ""]
        for header, *rows in found:
            lines += [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)] + [""]
    return "\n\n".join(["\n".join(lines).rstrip(), *notes(entries), f"![{CURVE_TITLE}](curve.png)\n"])


def plot(path: Path, runs: Sequence[dict[str, Any]], entries: Sequence[dict[str, Any]]) -> None:
    """Evaluations against environment steps: a panel per task, a thin line per seed, a thick one of the mean.

    What takes no environment steps is a level line; a search that ends at one point is a mark.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks = list(dict.fromkeys(entry["task"] for entry in entries))
    labels = list(dict.fromkeys(label(entry) for entry in entries))
    size = (7.0 * len(tasks), 5.0 + 0.2 * -(-len(labels) // 3))
    figure, axes = plt.subplots(1, len(tasks), figsize=size, squeeze=False, layout="constrained")
    panels: dict[str, Any] = dict(zip(tasks, axes[0]))
    measures = {entry["task"]: measure_in(entry) for entry in entries}
    shown: dict[str, Any] = {}
    for entry in entries:
        mine = [r for r in runs if (r["task"], r["method"]) == (entry["task"], entry["method"])]
        colour = plt.get_cmap("tab20")(labels.index(label(entry)) % 20)
        shown[label(entry)] = _draw(panels[entry["task"]], entry, mine, colour)
    for task, axis in panels.items():
        axis.set(title=task, xlabel="environment steps", ylabel=f"{measures[task].name}, evaluation episodes")
        axis.set_xlim(left=0)
        if measures[task] is SUCCESS:
            axis.set_ylim(0, 1.03)
    # Beside the panels: a curve may lie anywhere.
    figure.legend(list(shown.values()), list(shown), loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


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


STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 1200px; padding: 0 1rem }
table { border-collapse: collapse; font-size: 13px; margin-bottom: 1rem } .wide { overflow-x: auto }
th, td { border-bottom: 1px solid #ddd; padding: .35rem .6rem; text-align: right; vertical-align: top }
th:first-child, td:first-child { text-align: left; white-space: nowrap } th { background: #f5f5f5 }
img { max-width: 100% } figure { display: inline-block; margin: .5rem; width: 360px } video { width: 100% }
figcaption { font-size: 13px; color: #555 } .notes { color: #555; font-size: 13px }
"""


def page(
    title: str,
    facts: Sequence[str],
    entries: Sequence[dict[str, Any]],
    curve: Path,
    videos: Sequence[tuple[str, Path]],
) -> str:
    """The report as one HTML file that refers to no other; ``curve`` is a PNG, ``videos`` (caption, MP4)."""

    def element(tag: str, text: str) -> str:
        return f"<{tag}>{html.escape(text)}</{tag}>"

    def line(tag: str, cells: Sequence[str]) -> str:
        return f"<tr>{''.join(element(tag, cell) for cell in cells)}</tr>"

    def embedded(path: Path, kind: str) -> str:
        return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"

    parts = [
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'>{element('title', title)}",
        f"<style>{STYLE}</style></head><body>{element('h1', title)}",
        f"<ul>{''.join(element('li', fact) for fact in facts)}</ul>",
    ]
    for task, found in tables(entries):
        parts.append(element("h2", task))
        for header, *rows in found:
            parts += ["<div class='wide'><table>", line("th", header), *(line("td", row) for row in rows)]
            parts.append("</table></div>")
    parts += [f"<p class='notes'>{html.escape(text)}</p>" for text in notes(entries)]
    parts.append(element("h2", CURVE_TITLE.capitalize()))
    parts.append(f"<img alt='{CURVE_TITLE}' src='{embedded(curve, 'image/png')}'>")
    if videos:
        parts.append("<h2>Videos</h2><p class='notes'>Green border: success; red: failure.</p>")
    for caption, path in videos:
        video = f"<video controls loop muted src='{embedded(path, 'video/mp4')}'></video>"
        parts.append(f"<figure>{video}{element('figcaption', caption)}</figure>")
    return "\n".join([*parts, "</body></html>", ""])


def write_report(
    output: Path,
    title: str,
    facts: Sequence[str],
    runs: Sequence[dict[str, Any]],
    videos: Sequence[tuple[str, Path]],
) -> str:
    """Write compare.md, compare.json, curve.png and report.html; return the Markdown."""
    entries, curve = summarise(runs), output / "curve.png"
    text = markdown(title, facts, entries)
    write_json(output / "compare.json", {"title": title, "facts": list(facts), "methods": entries})
    (output / "compare.md").write_text(text, encoding="utf-8")
    plot(curve, runs, entries)
    (output / "report.html").write_text(page(title, facts, entries, curve, videos), encoding="utf-8")
    return text
