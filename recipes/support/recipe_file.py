"""``--config_path``: recipes by their name, and one file for `adapt`, `probe`, `eval` and `compare`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trimtab.adapters.checkpoint.folder import is_server
from trimtab.recipes.cli.recipes import LORA, RECIPES, config_of
from trimtab.recipes.compare.from_recipe import comparison, is_recipe
from trimtab.recipes.support.console import say
from trimtab.recipes.support.repeat import retyped, without_plugins

OPTION = "--config_path"
# Parts of adapt's config that no other command has a use for.
ADAPT_ONLY = (
    *("rl", "noise", "observe", "train", "demos", "checkpoint", "faults"),
    *("num_envs", "resume", "trackers"),
)
# What else of such a file a command leaves: a probe runs fewer episodes than an evaluation.
LEFT = {"eval": ADAPT_ONLY, "probe": (*ADAPT_ONLY, "eval", "seed")}


def split_options(args: list[str]) -> Iterator[tuple[str, str, list[str]]]:
    """(option, value, the arguments that say so) for each option of a command line."""
    index = 0
    while index < len(args):
        arg = args[index]
        apart = "=" not in arg and index + 1 < len(args) and not args[index + 1].startswith("--")
        option, _, value = arg.partition("=")
        yield option, args[index + 1] if apart else value, args[index : index + 1 + apart]
        index += 1 + apart


def with_recipe(args: list[str], command: str) -> list[str]:
    """``args`` with the name of a recipe replaced by its file.

    Raises:
        UserError: neither a file nor a recipe.
    """
    from trimtab.adapters.errors import UserError

    found: list[str] = []
    for option, value, said in split_options(args):
        if option != OPTION or Path(value).is_file():
            found += said
            continue
        path = config_of(value, command)
        if path is None:
            raise UserError(
                OPTION, f"there is no file {value}, and no such recipe; there are {', '.join(RECIPES)}"
            )
        found.append(f"{OPTION}={path}")
    return found


def read_options(path: str | Path | None) -> dict[str, Any] | None:
    """The options in a YAML or JSON file; ``None`` where it cannot be read, which parsing then says."""
    import yaml

    if path is None or not Path(path).is_file():
        return None
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError):
        return None
    return content if isinstance(content, dict) else None


def write_options(path: Path, content: dict[str, Any]) -> Path:
    """Write options as YAML."""
    import yaml

    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def kept(content: dict[str, Any], command: str, path: str | None = None) -> dict[str, Any]:
    """What ``command`` takes of the options of a file: of adapt's what concerns it, of any other all."""
    if command == "compare" and is_recipe(content):
        lora = read_options(Path(path).with_name(LORA)) if path else None
        return comparison(content, lora, is_server((content.get("policy") or {}).get("path")))
    left = LEFT.get(command, ()) if set(content) & set(ADAPT_ONLY) else ()
    return {name: value for name, value in content.items() if name not in left}


def file_options(args: list[str], say: Callable[[str], None] = lambda line: None) -> dict[str, Any] | None:
    """The options of the file that ``args`` name, less those of a type that they replace.

    Args:
        args: the command line.
        say: gets a line about what is left out.
    """
    said = {option: value for option, value, _ in split_options(args)}
    content, lines = retyped(read_options(said.get(OPTION)), said)
    for line in lines:
        say(line)
    return content


@contextmanager
def fitted(path: str | None, command: str, args: list[str]) -> Iterator[str | None]:
    """A file with what ``command`` takes of the options in ``path``; ``path`` itself where that is all.

    So the file of a recipe, or the config.json of a run, also says what to probe and evaluate. What the
    command line ``args`` gives another type does not count.
    """
    content = read_options(path)
    taken = file_options(args, say)
    taken = kept(without_plugins(taken), command, path) if taken is not None else None
    if taken == content:
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        yield str(write_options(Path(folder) / "options.yaml", taken))
