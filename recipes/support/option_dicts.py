"""Options as nested dicts: read from a command line or a file, merged, and kept to repeat a run."""

import json
import os
import sys
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

from draccus.cfgparsing import load_config, parse_string
from draccus.utils import flatten

from trimtab.adapters.checkpoint.folder import is_server
from trimtab.adapters.errors import UserError, reason

Options = dict[str, Any]
CONFIG_PATH = "--config_path"
ONCE = ("output_dir", "resume", "only")  # what the next run says anew
PLUGIN = "discover_packages_path"
TASK = "{task}"  # stands for the task in texts of `trimtab compare`
# Options that may name a folder or file of this machine.
PLACES = (
    *("policy.path", "policy.tokenizer", "policy.backbone", "policy.base_path"),
    *("demos.root", "train.warm_start", "dataset.root", "from_episodes"),
)
# Packages that this process has loaded, by option. Importing cannot be undone, so this is the process's own.
_loaded: dict[str, str] = {}


class Flag(str):
    """The value of an option that is named without one."""


def read_arguments(args: list[str]) -> Options:
    """The options of a command line (``--a.b=value``, ``--a.b value`` or ``--a.b``), read as YAML.

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
    try:
        value = parse_string(text)
    except Exception as error:  # YAML's errors come in many classes
        raise UserError(option, f"cannot be read as YAML: {reason(error)}") from None
    if text == TASK:  # which YAML takes for a mapping
        return text
    if "#" in text and isinstance(value, str | None) and not text.startswith(("'", '"')):
        return text  # which YAML ends where a comment begins
    if isinstance(value, str) and value.startswith("include "):  # draccus' word for a part in a file
        return read_options(value.removeprefix("include "), option)
    return at_home(value)


def at_home(value: Any) -> Any:
    """``value`` with the user's home in the place of the ``~/`` that texts in it begin with.

    A shell expands that in ``--output_dir ~/run``, and leaves it in ``--output_dir=~/run``.
    """
    if isinstance(value, dict):
        return {name: at_home(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [at_home(inner) for inner in value]
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else value


def read_options(path: str | Path, option: str = "") -> Options:
    """The options in a YAML, JSON or TOML file; errors name ``option``, by default ``--config_path``.

    Raises:
        UserError: it cannot be read, or holds no options.
    """
    option = option or f"{CONFIG_PATH}={path}"
    try:
        with open(path, encoding="utf-8") as stream:
            content = load_config(stream, file=path)
    except Exception as error:
        raise UserError(option, f"cannot be read ({reason(error)})") from None
    if not isinstance(content, dict):
        raise UserError(option, "holds no options, such as `seed: 3`")
    return at_home(content)


def merge(below: Options, above: Options) -> Options:
    """``below`` with what ``above`` says.

    A part to which ``above`` gives another type begins empty, and one that ``above`` says is empty is.
    """
    merged = dict(below)
    for name, value in above.items():
        if isinstance(value, dict):
            before = merged.get(name)
            before = before if isinstance(before, dict) else {}
            types = before.get("type"), value.get("type")
            goes_on = (value or "type" in before) and (None in types or types[0] == types[1])
            value = merge(before if goes_on else {}, value)
        merged[name] = value
    return merged


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


@cache
def register_installed() -> None:
    """Register what installed packages bring, once: LeRobot reads the metadata of all of them."""
    from lerobot.utils.import_utils import register_third_party_plugins

    register_third_party_plugins()


def load_plugins(*layers: Options) -> list[Options]:
    """Register other people's environments and policies as LeRobot's commands do; later ``layers`` win.

    Returns:
        ``layers`` without the options that name packages.

    Raises:
        UserError: a package cannot be loaded.
    """
    from lerobot.configs.parser import load_plugin

    register_installed()
    _loaded.clear()
    for layer in layers:
        named = {name: str(value) for name, value in flatten(layer).items() if is_plugin(name) and value}
        _loaded.update(named)
    for option, package in _loaded.items():
        try:
            load_plugin(package)
        except Exception as error:  # a plugin is somebody else's code
            # LeRobot imports a package, then looks for its modules; a single module has none.
            module = sys.modules.get(package)
            if module is None or hasattr(module, "__path__"):
                raise UserError(f"--{option}", str(error)) from None
    return [without_plugins(layer) for layer in layers]


def is_plugin(name: str) -> bool:
    """Whether an option (dotted) names a package to load."""
    return str(name).split(".")[-1] == PLUGIN


def loaded_plugins() -> dict[str, str]:
    """The packages that the command's options have loaded: ``{"env.discover_packages_path": "mine"}``."""
    return dict(_loaded)


def without_plugins(content: Options) -> Options:
    """A copy of options without those that name packages to load."""
    return {
        name: without_plugins(value) if isinstance(value, dict) else value
        for name, value in content.items()
        if not is_plugin(name)
    }


def filled(value: Any, task: str) -> Any:
    """``value`` with ``task`` in the place of each ``{task}`` in its texts."""
    if isinstance(value, dict):
        return {key: filled(inner, task) for key, inner in value.items()}
    if isinstance(value, list):
        return [filled(inner, task) for inner in value]
    return value.replace(TASK, task) if isinstance(value, str) else value


def repeatable(content: Options) -> Options:
    """A command's options as JSON that runs again from any folder: with plugins, and absolute paths."""
    content = json.loads(json.dumps(content, default=str))
    found = absolute({n: value for n, value in content.items() if value is not None and n not in ONCE})
    for option, package in _loaded.items():
        put(found, option, package)
    return found


def absolute(content: Options) -> Options:
    """A copy of options in which the folders and files that are there have absolute paths."""
    found = deepcopy(content)
    for name in PLACES:
        place = value_at(found, name)
        if isinstance(place, str) and place and not is_server(place) and Path(place).expanduser().exists():
            put(found, name, os.path.abspath(Path(place).expanduser()))
    return found
