"""What it takes to run a command again, from anywhere: plugins, places, and options of one type only.

Imports nothing heavy: options are read before anything else is loaded.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from trimtab.adapters.checkpoint.folder import is_server
from trimtab.adapters.errors import UserError
from trimtab.recipes.support.option_dicts import flatten, merge, put

PLUGIN = "discover_packages_path"
# Options that may name a folder or file of this machine.
PLACES = (
    *("policy.path", "policy.tokenizer", "policy.backbone", "policy.base_path"),
    *("demos.root", "train.warm_start", "dataset.root"),
)
ONCE = ("output_dir", "resume", "only")  # what the next run says anew
# Packages that this process has loaded, by option. Importing cannot be undone, so this is the process's own.
_loaded: dict[str, str] = {}


def load_plugins(*layers: dict[str, Any]) -> list[dict[str, Any]]:
    """Register other people's environments and policies as LeRobot's commands do.

    Args:
        layers: options, of which the later ones win.

    Returns:
        ``layers`` without the options that name packages.

    Raises:
        UserError: a package cannot be loaded.
    """
    from lerobot.configs.parser import load_plugin
    from lerobot.utils.import_utils import register_third_party_plugins

    register_third_party_plugins()
    _loaded.clear()
    for layer in layers:
        _loaded.update(
            {name: str(value) for name, value in flatten(layer).items() if is_plugin(name) and value}
        )
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


def without_plugins(content: dict[str, Any]) -> dict[str, Any]:
    """A copy of options without those that name packages to load."""
    return {
        name: without_plugins(value) if isinstance(value, dict) else value
        for name, value in content.items()
        if not is_plugin(name)
    }


def repeatable(content: dict[str, Any]) -> dict[str, Any]:
    """A command's options as JSON that runs again from any folder: with plugins, and absolute paths."""
    content = json.loads(json.dumps(content, default=str))
    content = {name: value for name, value in content.items() if value is not None and name not in ONCE}
    plugins: dict[str, Any] = {}
    for option, package in _loaded.items():
        put(plugins, option, package)
    return merge(absolute(content), plugins)


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
