"""Which files a model's weights lie in: one safetensors file, or the shards that an index names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trimtab.adapters.errors import UserError, reason

OPTION = "--policy.path"
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
# Where transformers and diffusers look for the weights of a part, in their order.
PART_WEIGHTS = (
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    WEIGHTS,
    WEIGHTS_INDEX,
)


def has_weights(folder: Path) -> bool:
    """Whether the folder holds a policy's whole weights, in one file or in shards."""
    return (folder / WEIGHTS).is_file() or (folder / WEIGHTS_INDEX).is_file()


def whole_weights(folder: Path) -> list[Path]:
    """The files with a policy's whole weights: one, or its shards.

    LeRobot and transformers write either; where both are there, nobody can tell which is the newer.

    Raises:
        UserError: a shard is missing, or there are both.
    """
    whole, index = folder / WEIGHTS, folder / WEIGHTS_INDEX
    if not index.is_file():
        return [whole]
    shards = sharded(index)
    there = [path for path in shards if path.is_file()]
    if whole.is_file():
        if there and shards != [whole]:
            raise UserError(
                OPTION,
                f"{folder} holds weights twice, in {WEIGHTS} and in the {len(there)} shards of {index.name}; "
                "remove those that do not count (LeRobot reads the former)",
            )
        return [whole]  # the index has been left behind
    missing = [path.name for path in shards if path not in there]
    if missing:
        raise UserError(
            OPTION,
            f"{folder} lacks {len(missing)} of the {len(shards)} shards that {index.name} names: "
            f"{', '.join(missing)}",
        )
    return shards


def part_weights(folder: Path, option: str = OPTION) -> list[Path]:
    """The safetensors files of a model that transformers or diffusers saved, whole or in shards.

    Raises:
        UserError: there are none.
    """
    name = next((name for name in PART_WEIGHTS if (folder / name).is_file()), None)
    if name is None:
        raise UserError(option, f"{folder} holds no weights in safetensors files")
    return sharded(folder / name, option) if name.endswith(".index.json") else [folder / name]


def sharded(index: Path, option: str = OPTION) -> list[Path]:
    """The files that an index of safetensors shards names, in order.

    Raises:
        UserError: it is no such index, or names a file elsewhere.
    """
    named = read_json(index).get("weight_map")
    names = sorted({str(name) for name in named.values()}) if isinstance(named, dict) else []
    if not names:
        raise UserError(option, f"{index} names no shards")
    elsewhere = [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]
    if elsewhere:
        raise UserError(option, f"{index} names '{elsewhere[0]}', which is no safetensors file beside it")
    return [index.parent / name for name in names]


def tensor_names(path: Path, option: str = OPTION) -> list[str]:
    """The names of a safetensors file's tensors; nothing else is read.

    Raises:
        UserError: truncated, or no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(option, f"{path} is truncated or no safetensors file ({reason(error)})") from None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where it holds something else.

    Raises:
        UserError: not JSON, or not to be read.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(OPTION, f"{path} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(OPTION, f"{path} is not JSON ({error}); the folder is half-written") from None
    return raw if isinstance(raw, dict) else {}
