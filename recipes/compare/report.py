"""The report of a comparison: Markdown, JSON, a figure, and one HTML file with everything in it."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from trimtab.recipes.compare.aggregates import aggregate
from trimtab.recipes.compare.measure import RETURN, SUCCESS, Measure, measure_in
from trimtab.recipes.compare.plots import plot_aggregates, plot_curves
from trimtab.recipes.compare.summary import WINDOW, label, summarise
from trimtab.recipes.support.reporting import write_json

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
AGGREGATE_TEXT = """
All tasks: scores are success rates, or returns divided by the base's mean return. Inter-quartile mean over
tasks and seeds, and the probability that a run of the one method scores higher than a run of the other (mean
over the tasks; a tie counts a half), by rliable, of seeds that all tasks have. Steps to a final level: the
mean of that method's last evaluations over its seeds; of each run, the first evaluation that is as high, as a
share of that method's steps (0: the base is, too); median over tasks and seeds, and how many runs got there.
Brackets: 95 % intervals by stratified bootstrap over the seeds; without, there is one seed.
"""
DIPS_TEXT = """
While learning: windows are 50 consecutive training episodes within the first 10,000 environment steps. They
overlap. Below the base: significantly so by Fisher's exact test, one-sided 95 %, each window for itself, so
that a few of many are to be expected even without a dip.
"""
CURVE_TITLE = "evaluations against environment steps"
AGGREGATES_TITLE = "aggregates over tasks and seeds"


def notes(entries: Sequence[dict[str, Any]], aggregates: Sequence[dict[str, Any]]) -> list[str]:
    """What the columns mean."""
    used = {measure_in(entry) for entry in entries}
    won, paid, together = SUCCESS in used, RETURN in used, bool(aggregates)
    texts = {SUCCESS_TEXT: won, RETURN_TEXT: paid, COST_TEXT: True, DIPS_TEXT: won, AGGREGATE_TEXT: together}
    return [" ".join(text.split()) for text, shown in texts.items() if shown]


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


def aggregate_row(entry: dict[str, Any]) -> dict[str, str]:
    """What the last table shows of an entry of ``aggregate``."""

    def within(name: str) -> str:
        if name not in entry:
            return "-"
        numbers = (entry[name], *(entry[f"{name}_ci95"] or ()))
        value, *limits = ("never" if number is None else f"{number:.3f}" for number in numbers)
        return value + (f" [{', '.join(limits)}]" if limits else "")

    runs = entry["seeds"] * entry["tasks"]
    found = {"all tasks": label(entry), "runs": str(runs), "inter-quartile mean of scores": within("iqm")}
    if entry["improved"]:
        found[f"probability that {entry['improved']} scores higher"] = within("improvement")
    if entry["reach"]:
        there = f" ({entry['reached']}/{runs})" if "share" in entry else ""
        found[f"share of the steps of {entry['reach']} to its final level"] = within("share") + there
    return found


def tables(
    entries: Sequence[dict[str, Any]], aggregates: Sequence[dict[str, Any]]
) -> Iterator[tuple[str, list[list[list[str]]]]]:
    """Each task with its tables, and that of all tasks: rows of cells, the first of them the header."""

    def cells(rows: Sequence[dict[str, str]]) -> list[list[str]]:
        return [list(rows[0]), *(list(row.values()) for row in rows)]

    for task in dict.fromkeys(entry["task"] for entry in entries):
        mine = [entry for entry in entries if entry["task"] == task]
        learning = [learning_row(one) for one in mine if max(one["env_steps"]) and one["to_level"]]
        yield task, [cells(rows) for rows in ([row(one) for one in mine], learning) if rows]
    if aggregates:
        yield "All tasks", [cells([aggregate_row(one) for one in aggregates])]


def markdown(
    title: str,
    facts: Sequence[str],
    entries: Sequence[dict[str, Any]],
    aggregates: Sequence[dict[str, Any]] = (),
) -> str:
    """The tables."""
    lines = [f"# {title}", "", *(f"- {fact}" for fact in facts), ""]
    for task, found in tables(entries, aggregates):
        lines += [f"## {task}", ""]
        for header, *rows in found:
            lines += [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)] + [""]
    figures = [f"![{CURVE_TITLE}](curve.png)"] + [f"![{AGGREGATES_TITLE}](aggregates.png)"] * bool(aggregates)
    return "\n\n".join(["\n".join(lines).rstrip(), *notes(entries, aggregates), *figures]) + "\n"


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
    aggregates: Sequence[dict[str, Any]],
    figures: dict[str, Path],
    videos: Sequence[tuple[str, Path]],
) -> str:
    """The report as one HTML file that refers to no other; ``figures``: PNGs by title, ``videos``: MP4."""

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
    for task, found in tables(entries, aggregates):
        parts.append(element("h2", task))
        for header, *rows in found:
            parts += ["<div class='wide'><table>", line("th", header), *(line("td", row) for row in rows)]
            parts.append("</table></div>")
    parts += [f"<p class='notes'>{html.escape(text)}</p>" for text in notes(entries, aggregates)]
    for name, figure in figures.items():
        parts += [
            element("h2", name.capitalize()),
            f"<img alt='{name}' src='{embedded(figure, 'image/png')}'>",
        ]
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
    compared: tuple[str, str] | None = None,
) -> str:
    """Write compare.md, compare.json, report.html and the figures; return the Markdown.

    ``compared`` asks for the aggregates over tasks and seeds: ``improved`` and ``reach`` of ``aggregate``.
    """
    entries, figures, facts = summarise(runs), {CURVE_TITLE: output / "curve.png"}, list(facts)
    aggregates: list[dict[str, Any]] = []
    try:
        aggregates = aggregate(runs, *compared) if compared else []
    except ValueError as error:
        facts.append(f"no aggregates over tasks and seeds: {error}")
    content = {"title": title, "facts": facts, "methods": entries, "aggregates": aggregates}
    write_json(output / "compare.json", content)
    plot_curves(figures[CURVE_TITLE], runs, entries)
    if aggregates:
        figures[AGGREGATES_TITLE] = output / "aggregates.png"
        plot_aggregates(figures[AGGREGATES_TITLE], aggregates)
    text = markdown(title, facts, entries, aggregates)
    (output / "compare.md").write_text(text, encoding="utf-8")
    html_text = page(title, facts, entries, aggregates, figures, videos)
    (output / "report.html").write_text(html_text, encoding="utf-8")
    return text
