"""Options as nested dicts: read from a command line or a file, and merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trimtab.adapters.errors import UserError, reason

Options = dict[str, Any]
CONFIG_PATH = "--config_path"


class Flag(str):
    """The value of an option that is named without one."""


def read_arguments(args: list[str]) -> Options:
    """The options of a command line; a value is read as YAML, as draccus does.

    Args:
        args: ``--a.b=value``, ``--a.b value`` or ``--a.b``.

    Raises:
        UserError: an argument is no option, or its value is no YAML.
    """
    found: Options = {}
    waiting = list(args)
    while waiting:
        option, equals, text = waiting.pop(0).partition("=")
        if not option.startswith("--"):
            raise UserError(option, "no such option; write --NAME=VALUE")
        if not equals and waiting and not waiting[0].startswith("--"):
            text, equals = waiting.pop(0), "="
        put(found, option[2:], _value(option, text) if equals else Flag("true"))
    return found


def _value(option: str, text: str) -> Any:
    from draccus.cfgparsing import parse_string

    try:
        value = parse_string(text)
    except Exception as error:  # YAML's errors come in many classes
        raise UserError(option, f"cannot be read as YAML: {reason(error)}") from None
    if isinstance(value, str) and value.startswith("include "):  # draccus' word for a part in a file
        return read_options(value.removeprefix("include "), option)
    return value


def read_options(path: str | Path, option: str = "") -> Options:
    """The options in a YAML, JSON or TOML file.

    Args:
        path: the file.
        option: that names it, for errors; default ``--config_path``.

    Raises:
        UserError: it cannot be read, or holds no options.
    """
    from draccus.cfgparsing import load_config

    option = option or f"{CONFIG_PATH}={path}"
    try:
        with open(path, encoding="utf-8") as stream:
            content = load_config(stream, file=path)
    except Exception as error:
        raise UserError(option, f"cannot be read ({reason(error)})") from None
    if not isinstance(content, dict):
        raise UserError(option, "holds no options, such as `seed: 3`")
    return content


def merge(below: Options, above: Options) -> Options:
    """``below`` with what ``above`` says. A part to which ``above`` gives another type begins empty."""
    merged = dict(below)
    for name, value in above.items():
        if isinstance(value, dict):
            before = merged.get(name)
            kept = isinstance(before, dict) and before.get("type") in (
                None,
                value.get("type", before.get("type")),
            )
            value = merge(before if kept else {}, value)
        merged[name] = value
    return merged


def flatten(options: Options, prefix: str = "") -> Options:
    """Nested options by dotted names: ``{"rl": {"gamma": 1}}`` -> ``{"rl.gamma": 1}``."""
    flat: Options = {}
    for name, value in options.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def value_at(options: Options, name: str) -> Any:
    """The value of a dotted name; ``None`` where there is none."""
    value: Any = options
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def put(options: Options, name: str, value: Any) -> None:
    """Set the value of a dotted name in place."""
    *parents, last = name.split(".")
    for part in parents:
        if not isinstance(options.get(part), dict):
            options[part] = {}
        options = options[part]
    options[last] = value
