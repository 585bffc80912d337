"""The report of a comparison: Markdown, JSON, a figure, and one HTML file with everything in it."""

import base64
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from trimtab.recipes.compare.aggregates import aggregate
from trimtab.recipes.compare.measure import SUCCESS, Measure, count_unreported, measure_in
from trimtab.recipes.compare.plots import plot_aggregates, plot_curves
from trimtab.recipes.compare.summary import WINDOW, label, summarise
from trimtab.recipes.support.reporting import write_json

# Beside this file; notes.jinja says what the columns mean.
MARKDOWN, HTML = "report.md.jinja", "report.html.jinja"
TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=lambda name: name == HTML,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


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
) -> Iterator[tuple[str, list[list[dict[str, str]]]]]:
    """Each task with its tables, and that of all tasks: rows of cells by column."""
    for task in dict.fromkeys(entry["task"] for entry in entries):
        mine = [entry for entry in entries if entry["task"] == task]
        learning = [learning_row(one) for one in mine if max(one["env_steps"]) and one["to_level"]]
        yield task, [rows for rows in ([row(one) for one in mine], learning) if rows]
    if aggregates:
        yield "All tasks", [[aggregate_row(one) for one in aggregates]]


def rendered(
    template: str,
    title: str,
    facts: Sequence[str],
    entries: Sequence[dict[str, Any]],
    aggregates: Sequence[dict[str, Any]] = (),
    folder: Path = Path(),
    videos: Sequence[tuple[str, Path]] = (),
) -> str:
    """The report by ``template``; the figures lie in ``folder``, ``videos`` are MP4 by caption."""
    measures, together = {measure_in(entry).name for entry in entries}, bool(aggregates)
    notes = TEMPLATES.get_template("notes.jinja").render(measures=measures, together=together)
    return TEMPLATES.get_template(template).render(
        title=title,
        facts=facts,
        sections=list(tables(entries, aggregates)),
        notes=[" ".join(text.split()) for text in notes.split("\n\n")],
        together=together,
        videos=videos,
        embedded=lambda path: base64.b64encode((folder / path).read_bytes()).decode(),
    )


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
    count_unreported(runs)
    entries, facts = summarise(runs), list(facts)
    videos = [(caption, path.absolute()) for caption, path in videos]  # the report lies in another folder
    aggregates: list[dict[str, Any]] = []
    try:
        aggregates = aggregate(runs, *compared) if compared else []
    except ValueError as error:
        facts.append(f"no aggregates over tasks and seeds: {error}")
    content = {"title": title, "facts": facts, "methods": entries, "aggregates": aggregates}
    write_json(output / "compare.json", content)
    plot_curves(output / "curve.png", runs, entries)
    if aggregates:
        plot_aggregates(output / "aggregates.png", aggregates)
    for name, template in (("report.html", HTML), ("compare.md", MARKDOWN)):
        text = rendered(template, title, facts, entries, aggregates, output.absolute(), videos)
        (output / name).write_text(text, encoding="utf-8")
    return text
