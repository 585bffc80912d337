"""What tells one base policy from any other: hashes of its files and of its weights in memory."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trimtab.adapters.checkpoint.files import (
    CONFIG,
    PEFT_CONFIG,
    POSTPROCESSOR,
    PREPROCESSOR,
    part_weights,
    read_json,
    state_files,
)
from trimtab.adapters.checkpoint.folder import is_peft, weights_files

# Entries of the JSON files that say where a policy lies, runs or comes from, not what it computes.
ELSEWHERE = {
    *("base_model_name_or_path", "_name_or_path", "pretrained_path", "repo_id", "revision"),
    *("license", "private", "push_to_hub", "tags"),
}


def hash_files(paths: Iterable[Path]) -> str:
    """SHA-256 over the bytes of files, one after another, as hex."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


def file_hash(folder: Path, base_path: str | None = None) -> str:
    """SHA-256 of a policy folder's weights, as hex; of a PEFT checkpoint, the adapter's and its base's."""
    return hash_files(weights_files(folder, base_path))


def settings_hashes(folder: Path, parts: Mapping[str, Path] | None = None) -> dict[str, str]:
    """SHA-256 of every file beside the weights that decides what a policy computes, by name.

    These are the policy's config, both processors and their statistics, a PEFT adapter's config, and the
    config and weights of each frozen part outside the checkpoint; no tokenizers. JSON files are hashed by
    content, without what may differ on another machine: devices, entries about the Hub (``ELSEWHERE``), and
    every string that is a path or the name of a Hub repository (it holds a slash and no space).
    """
    names = [CONFIG, PREPROCESSOR, POSTPROCESSOR, *([PEFT_CONFIG] if is_peft(folder) else [])]
    paths = {name: folder / name for name in (*names, *state_files(folder))}
    for part, where in (parts or {}).items():
        paths |= {f"{part}/{path.name}": path for path in (where / CONFIG, *part_weights(where))}
    hashes = {}
    for name, path in paths.items():
        if path.suffix == ".json" and path.is_file():
            content = json.dumps(_portable(read_json(path)), sort_keys=True)
            hashes[name] = hashlib.sha256(content.encode()).hexdigest()
        elif path.is_file():
            hashes[name] = hash_files([path])
    return hashes


def _portable(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _portable(v) for k, v in value.items() if k not in ELSEWHERE and not k.endswith("device")}
    if isinstance(value, list):
        return [_portable(item) for item in value]
    if isinstance(value, str) and ("/" in value or "\\" in value) and " " not in value:
        return "a path"
    return value


def weights_hash(policy: torch.nn.Module, *parts: torch.nn.Module) -> str:
    """SHA-256 over the names and bytes of a model's tensors in memory, and of further ones, as hex."""
    digest = hashlib.sha256()
    for module in (policy, *parts):
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def placement(policy: torch.nn.Module) -> dict[str, str]:
    """The precisions and the kind of device of a model's weights; ``weights_hash`` depends on the former."""
    tensors = [tensor for tensor in policy.state_dict().values() if tensor.is_floating_point()]
    return {
        "weights_dtype": ",".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})),
        "weights_device": ",".join(sorted({tensor.device.type for tensor in tensors})),
    }


def same_answer(then: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether two identities of a served policy are of one that rounds."""
    known, answer = then["answer"], now["answer"]
    return len(known) == len(answer) and np.abs(np.subtract(known, answer)).max() <= then["tolerance"]
