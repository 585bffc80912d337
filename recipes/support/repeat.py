"""What it takes to run a command again, from anywhere: plugins, places, and options of one type only.

Imports nothing heavy: options are read before anything else is loaded.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from trimtab.adapters.checkpoint.folder import is_server
from trimtab.adapters.errors import UserError
from trimtab.rl.algorithms.presets import flatten

PLUGIN = "discover_packages_path"
# Options that may name a folder or file of this machine.
PLACES = (
    *("policy.path", "policy.tokenizer", "policy.backbone", "policy.base_path"),
    *("demos.root", "train.warm_start", "dataset.root"),
)
# Parts of a config whose other options belong to its type.
TYPED = ("rl", "noise", "env")
PACE = ("warmup_transitions", "first_update", "updates_per_transition")
# Packages that this process has loaded, by option. Importing cannot be undone, so this is the process's own.
_loaded: dict[str, str] = {}


def load_plugins(args: list[str], content: dict[str, Any] | None) -> list[str]:
    """Register other people's environments and policies as LeRobot's commands do.

    Args:
        args: the command line, which wins.
        content: the options of a file.

    Returns:
        ``args`` without the ``--...discover_packages_path`` options.

    Raises:
        UserError: a package cannot be loaded.
    """
    from lerobot.configs import parser
    from lerobot.utils.import_utils import register_third_party_plugins

    register_third_party_plugins()
    said = parser.parse_plugin_args(parser.PLUGIN_DISCOVERY_SUFFIX, args)
    held = {name: str(value) for name, value in flatten(content or {}).items() if is_plugin(name) and value}
    _loaded.clear()
    for option, package in (held | said).items():
        try:
            parser.load_plugin(package)
        except Exception as error:  # a plugin is somebody else's code
            # LeRobot imports a package, then looks for its modules; a single module has none.
            module = sys.modules.get(package)
            if module is None or hasattr(module, "__path__"):
                raise UserError(f"--{option}", str(error)) from None
        args = parser.filter_arg(option, args)
        _loaded[option] = package
    return args


def is_plugin(name: str) -> bool:
    """Whether an option (dotted) names a package to load."""
    return name.split(".")[-1] == PLUGIN


def loaded_plugins() -> dict[str, str]:
    """The packages that the command's options have loaded: ``{"env.discover_packages_path": "mine"}``."""
    return dict(_loaded)


def without_plugins(content: dict[str, Any]) -> dict[str, Any]:
    """A copy of options without those that name packages to load."""
    return {
        name: without_plugins(value) if isinstance(value, dict) else value
        for name, value in content.items()
        if not is_plugin(name)
    }


def repeatable(content: dict[str, Any]) -> dict[str, Any]:
    """A copy of a command's options that runs again from any folder: with plugins, and absolute places."""
    found = absolute(content)
    for option, package in _loaded.items():
        *parents, last = option.split(".")
        part = found
        for parent in parents:
            part[parent] = dict(part.get(parent) or {})
            part = part[parent]
        part[last] = package
    return found


def absolute(content: dict[str, Any]) -> dict[str, Any]:
    """A copy of options in which the folders and files that are there have absolute paths."""
    found = dict(content)
    for name in PLACES:
        part, _, last = name.partition(".")
        held = found.get(part)
        value = held.get(last) if isinstance(held, dict) else None
        if isinstance(value, str) and value and not is_server(value) and Path(value).expanduser().exists():
            found[part] = {**held, last: os.path.abspath(Path(value).expanduser())}
    return found


def retyped(content: dict[str, Any] | None, said: dict[str, str]) -> tuple[dict[str, Any] | None, list[str]]:
    """The options of a file under a command line that may give a part another type.

    Such a part begins at its own type's defaults: what the file says of another type is left out, and so is
    the pace of training that is only the other algorithm's own.

    Args:
        content: the file's options.
        said: the command line's, by option (``--rl.type``).

    Returns:
        (the options, a line for each part that is left out)
    """
    if content is None:
        return None, []
    found, lines = dict(content), []
    for part in TYPED:
        held, now = content.get(part), said.get(f"--{part}.type")
        before = held.get("type") if isinstance(held, dict) else None
        if now is None or before in (None, now):
            continue
        found[part] = {"type": now}
        left = [f"{part}.{name}" for name in held if name != "type"]
        if part == "rl":
            found, more = _without_pace_of(before, found, said)
            left += more
        lines.append(
            f"--{part}.type={now} takes its own defaults; of the file's {before}, left out: "
            f"{', '.join(left) or 'nothing'}"
        )
    return found, lines


def _without_pace_of(
    algorithm: str, content: dict[str, Any], said: dict[str, str]
) -> tuple[dict[str, Any], list[str]]:
    """Options without what is only ``algorithm``'s own, outside of ``rl``; and the names of what that was."""
    from trimtab.rl.algorithms import AlgorithmConfig

    left: list[str] = []
    noise, train = content.get("noise"), content.get("train")
    if algorithm == "golden_ticket" and isinstance(noise, dict) and noise.get("type") == "constant":
        content = {name: value for name, value in content.items() if name != "noise"}
        left.append("noise")
    if isinstance(train, dict) and algorithm in AlgorithmConfig.get_known_choices():
        own = AlgorithmConfig.get_choice_class(algorithm)().pace
        odd = [name for name in PACE if train.get(name) is not None and train[name] == getattr(own, name)]
        content = {**content, "train": {name: value for name, value in train.items() if name not in odd}}
        left += [f"train.{name}" for name in odd]
    return content, left
