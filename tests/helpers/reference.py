"""`python -m tests.helpers.reference` prints the configuration reference.

It is made from the dataclasses.
What is said of an option is the comment above its field.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import textwrap
import types
import typing
from collections.abc import Iterator
from typing import Any

import draccus

from trimtab.recipes.cli import COMMANDS, config_class

HEAD = """\
# Configuration reference

Every option of every command, made from the dataclasses; to make it anew:

    python -m tests.helpers.reference > recipes/CONFIGURATION.md

A nested option is written with dots (`--train.env_steps=5000`), on the command line or in YAML
(`--config_path=`). Where a type is a link, its options are in that section; `--dataset.*`, `--peft.*` and,
but for the environments described here, `--env.*` are LeRobot's own. `--robot.NAME=` of
[RobotEnvConfig](#robotenvconfig) is short for `--env.NAME=`.
"""
LONGEST = 60
ENVIRONMENTS = (
    ("metaworld", "MetaworldStateConfig"),
    ("gym", "GymConfig"),
    ("robot.config", "RobotEnvConfig"),
)


def comments(cls: type) -> dict[str, str]:
    """What the source of ``cls`` says of the fields that it declares itself."""
    source = textwrap.dedent(inspect.getsource(cls))
    lines = source.splitlines()
    found: dict[str, str] = {}
    for node in ast.parse(source).body[0].body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        above: list[str] = []
        at = node.lineno - 2
        while at >= 0 and lines[at].strip().startswith("#"):
            above.insert(0, lines[at].strip().lstrip("# ").rstrip())
            at -= 1
        if above:
            found[node.target.id] = " ".join(above)
    return found


def described(cls: type) -> dict[str, str]:
    """What is said of each field, its own class' word before that of those it inherits from."""
    found: dict[str, str] = {}
    for part in reversed(cls.__mro__):
        if dataclasses.is_dataclass(part):
            found |= comments(part)
    return found


def is_ours(cls: Any) -> bool:
    """Whether a type is a dataclass of this project."""
    return dataclasses.is_dataclass(cls) and cls.__module__.startswith("trimtab.")


def choices(cls: type) -> dict[str, type]:
    """The classes that a registry of ours offers, by name."""
    if draccus.ChoiceRegistry not in cls.__bases__:
        return {}
    known = cls.get_known_choices().items()
    return {name: found for name, found in sorted(known) if found.__module__.startswith("trimtab.")}


def _parts(hint: Any) -> Iterator[Any]:
    """The types that a type hint names, within unions and containers, too."""
    inner = typing.get_args(hint)
    if not inner:
        yield hint
    for one in inner:
        yield from _parts(one)


def _type(hint: Any) -> str:
    if isinstance(hint, types.UnionType):
        return " or ".join(_type(one) for one in typing.get_args(hint))
    if hint is types.NoneType:
        return "none"
    if is_ours(hint):
        return f"[{hint.__name__}](#{hint.__name__.lower()})"
    if isinstance(hint, type) and not typing.get_args(hint):
        return hint.__name__
    return str(hint).replace("typing.", "").replace("pathlib.", "")


def _default(field: dataclasses.Field) -> str:
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return "required"
    if dataclasses.is_dataclass(value):
        return "its own" if not isinstance(value, draccus.ChoiceRegistry) else f"`{value.type}`"
    text = "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    text = text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."
    return f"`{text}`" if text else "empty"


def rows(cls: type) -> list[str]:
    """The table of a dataclass' fields."""
    said, hints = described(cls), typing.get_type_hints(cls)
    lines = ["| option | type | default | |", "|---|---|---|---|"]
    for field in dataclasses.fields(cls):
        if field.init:
            cells = [f"`{field.name}`", _type(hints[field.name]), _default(field), said.get(field.name, "")]
            lines.append(
                "| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |"
            )
    return lines


def reference() -> str:
    """The whole page."""
    waiting: list[type] = [
        getattr(importlib.import_module(f"trimtab.rl.envs.{module}"), name) for module, name in ENVIRONMENTS
    ]
    lines, seen = [HEAD], set(waiting)

    def look(cls: type) -> None:
        for hint in typing.get_type_hints(cls).values():
            for part in _parts(hint):
                if is_ours(part) and part not in seen:
                    seen.add(part)
                    waiting.append(part)

    for command, entry in COMMANDS.items():
        if entry.light:
            continue
        cls = config_class(command)
        lines += [f"## trimtab {command}", "", *rows(cls), ""]
        look(cls)
    for cls in waiting:  # which grows meanwhile
        lines += [f"### {cls.__name__}", ""]
        found = choices(cls)
        if found:
            lines += [f"One of: {', '.join(f'`{name}`' for name in found)} (`type`). Shared by all:", ""]
        else:
            lines += [_headline(cls), ""]
        lines += [*rows(cls), ""]
        look(cls)
        for name, choice in found.items():
            lines += [f"#### {cls.__name__}: {name}", "", _headline(choice), "", *rows(choice), ""]
            look(choice)
    return "\n".join(lines)


def _headline(cls: type) -> str:
    return (inspect.getdoc(cls) or "").partition("\n\n")[0].replace("\n", " ")


if __name__ == "__main__":
    print(reference(), end="")
