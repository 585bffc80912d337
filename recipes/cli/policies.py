"""`trimtab policies`: every policy type, its noise, and what one more noise costs; as a Markdown table.

The figures were counted before (``python -m tests.benchmarks.policies`` makes them anew).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.adapters import UserError
from trimtab.recipes.support.reporting import write_json

ROWS = Path(__file__).with_suffix(".json")
MANY = 16  # noises per observation
COLUMNS = (
    *("policy", "noise of one sample", "draws", "deterministic"),
    *("prefix share", f"{MANY} noises / 1", "counted on"),
)


@dataclass
class PoliciesConfig:
    """``trimtab policies``."""

    # Policy types, separated by commas; default: all.
    types: str = ""
    # Write the rows as JSON too.
    output: Path | None = None


def main(config: PoliciesConfig) -> None:
    rows = {row["type"]: row for row in json.loads(ROWS.read_text(encoding="utf-8"))}
    names = [name for name in map(str.strip, config.types.split(",")) if name] or list(rows)
    unknown = [name for name in names if name not in rows]
    if unknown:
        raise UserError("--types", f"no policy type {', '.join(unknown)}; there are {', '.join(rows)}")
    chosen = [rows[name] for name in names]
    if config.output and config.output.is_dir():
        raise UserError("--output", f"{config.output} is a folder; name a file")
    print(markdown(COLUMNS, [cells(row) for row in chosen]))
    if config.output:
        write_json(config.output, chosen)


def cells(row: dict[str, Any]) -> list[str]:
    """The columns of one policy type: ``share`` is encode's of a chunk, ``many`` costs as so many chunks."""
    inert = f" ({row['inert']} inert)" if row["inert"] else ""
    return [
        f"`{row['type']}`",
        f"{tuple(row['noise'])}{inert}",
        row["draws"],
        "yes" if row["deterministic"] else "no",
        f"{100 * row['share']:.0f} %",
        f"{row['many']:.1f}",
        row["counted_on"],
    ]


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in (columns, *rows)]
    lines.insert(1, "|" + "---|" * len(columns))
    return "\n".join(lines)
