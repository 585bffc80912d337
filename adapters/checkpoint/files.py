"""The files of a saved policy: their names, and how each is read. Nothing is unpickled."""

import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.adapters.errors import UserError, policy_error, reason

OPTION = "--policy.path"
BACKBONE = "--policy.backbone"
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
PREPROCESSOR = "policy_preprocessor.json"
POSTPROCESSOR = "policy_postprocessor.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
# Where transformers and diffusers look for the weights of a part, in their order.
PART_WEIGHTS = (
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    WEIGHTS,
    WEIGHTS_INDEX,
)
# Prefixes of the statistics that LeRobot kept among the weights before it saved processors.
OLD_STATISTICS = ("normalize_inputs.", "normalize_targets.", "unnormalize_outputs.", "unnormalize_targets.")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where it holds something else."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise policy_error(f"{path} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise policy_error(f"{path} is not JSON ({error}); the folder is half-written") from None
    return raw if isinstance(raw, dict) else {}


def processor_steps(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The steps of a saved processor, with the names that LeRobot's overrides go by; none without a file."""
    steps = read_json(path).get("steps") if path.is_file() else None
    return [
        (str(step.get("registry_name") or str(step.get("class", "")).rpartition(".")[2]), step)
        for step in (steps if isinstance(steps, list) else [])
        if isinstance(step, dict)
    ]


def state_files(folder: Path) -> list[str]:
    """Names of the files that the saved processors in ``folder`` keep their statistics in."""
    steps = [*processor_steps(folder / PREPROCESSOR), *processor_steps(folder / POSTPROCESSOR)]
    return [step["state_file"] for _, step in steps if isinstance(step.get("state_file"), str)]


@contextmanager
def whole_folder(folder: Path, option: str = "--output_dir") -> Iterator[Path]:
    """A folder to write into, which takes the place of ``folder`` once all is written, or vanishes."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise UserError(option, f"cannot write to {folder.parent} ({error.strerror})") from None
    try:
        yield work
        work.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        work.rename(folder)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def has_weights(folder: Path) -> bool:
    """Whether the folder holds a policy's whole weights, in one file or in shards."""
    return (folder / WEIGHTS).is_file() or (folder / WEIGHTS_INDEX).is_file()


def whole_weights(folder: Path) -> list[Path]:
    """The files with a policy's whole weights: one, or its shards.

    LeRobot and transformers write either; where both are there, nobody can tell which is the newer.
    """
    whole, index = folder / WEIGHTS, folder / WEIGHTS_INDEX
    if not index.is_file():
        return [whole]
    shards = _shards(index, OPTION)
    there = [path for path in shards if path.is_file()]
    if whole.is_file():
        if there and shards != [whole]:
            raise policy_error(
                f"{folder} holds weights twice, in {WEIGHTS} and in the {len(there)} shards of {index.name}; "
                "remove those that do not count (LeRobot reads the former)"
            )
        return [whole]  # the index has been left behind
    missing = [path.name for path in shards if path not in there]
    if missing:
        raise policy_error(
            f"{folder} lacks {len(missing)} of the {len(shards)} shards that {index.name} names: "
            f"{', '.join(missing)}"
        )
    return shards


def part_weights(folder: Path, option: str = OPTION) -> list[Path]:
    """The safetensors files of a model that transformers or diffusers saved, whole or in shards."""
    name = next((name for name in PART_WEIGHTS if (folder / name).is_file()), None)
    if name is None:
        raise UserError(option, f"{folder} holds no weights in safetensors files")
    return _shards(folder / name, option) if name.endswith(".index.json") else [folder / name]


def _shards(index: Path, option: str) -> list[Path]:
    """The files that an index of safetensors shards names, in order."""
    named = read_json(index).get("weight_map")
    names = sorted({str(name) for name in named.values()}) if isinstance(named, dict) else []
    if not names:
        raise UserError(option, f"{index} names no shards")
    elsewhere = [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]
    if elsewhere:
        raise UserError(option, f"{index} names '{elsewhere[0]}', which is no safetensors file beside it")
    return [index.parent / name for name in names]


ONE_MAPPING = 2**24  # bytes of a file that may stay in memory as a whole


@contextmanager
def open_weights(path: Path, option: str = OPTION) -> Iterator[Any]:
    """A safetensors file, of which ``keys()`` and ``get_tensor(name)`` read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(option, f"{path} is truncated or no safetensors file ({reason(error)})") from None


def each_weight(paths: Iterable[Path], option: str = OPTION) -> Iterator[tuple[Path, str, Tensor]]:
    """The tensors in files, one after another: what is read of one leaves the memory with it."""
    for path in paths:
        with open_weights(path, option) as file:
            names = list(file.keys())
            if path.stat().st_size < ONE_MAPPING:  # opening it for each takes longer than reading
                yield from ((path, name, file.get_tensor(name)) for name in names)
                continue
        for name in names:
            with open_weights(path, option) as file:  # a mapping of its own
                yield path, name, file.get_tensor(name)


def read_weights(
    paths: Path | Iterable[Path], option: str = OPTION, unchecked: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """The tensors of a model that lies in one safetensors file or in shards.

    They are mapped, and take memory where they are read. ``option`` is what the user has to change where one
    is corrupt or holds NaN or Inf; the names of tensors that may hold these begin with one of ``unchecked``.
    """
    tensors: dict[str, Tensor] = {}
    paths = [paths] if isinstance(paths, Path) else list(paths)
    for path in paths:
        with open_weights(path, option) as file:
            part = {name: file.get_tensor(name) for name in list(file.keys())}
        for name in part.keys() & tensors.keys():
            raise UserError(option, f"{path} holds '{name}', which an earlier shard holds too")
        tensors |= part
    for path, name, tensor in each_weight(paths, option):
        checked = tensor.is_floating_point() and not name.startswith(unchecked or "\0")
        if checked and not torch.isfinite(tensor).all():
            raise UserError(option, f"{path} holds NaN or Inf in '{name}'")
    return tensors
