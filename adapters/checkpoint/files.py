"""The files of a saved policy: find them, read them, hash them. Nothing is unpickled."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.adapters.checkpoint.weight_files import (
    CONFIG,
    OPTION,
    WEIGHTS,
    WEIGHTS_INDEX,
    has_weights,
    part_weights,
    read_json,
    tensor_names,
    whole_weights,
)
from trimtab.adapters.errors import UserError, reason

PREPROCESSOR = "policy_preprocessor.json"
POSTPROCESSOR = "policy_postprocessor.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
# Prefixes of the statistics that LeRobot kept among the weights before it saved processors.
OLD_STATISTICS = ("normalize_inputs.", "normalize_targets.", "unnormalize_outputs.", "unnormalize_targets.")
# Entries of the JSON files that say where a policy lies, runs or comes from, not what it computes.
ELSEWHERE = {
    "base_model_name_or_path",
    "_name_or_path",
    "license",
    "pretrained_path",
    "private",
    "push_to_hub",
    "repo_id",
    "revision",
    "tags",
}


def is_server(path: str | Path | None) -> bool:
    """Whether a policy's path is the address of a policy server."""
    return isinstance(path, str) and path.startswith(("ws://", "wss://"))


def resolve_folder(path: str, revision: str | None = None, token: str | None = None) -> Path:
    """Return the local folder of a policy, fetching it from the Hub where ``path`` is a repository.

    Args:
        path: folder, or ``owner/name`` on the Hub.
        revision: branch, tag or commit on the Hub.
        token: for private repositories; default: the Hub's own (``HF_TOKEN``, ``hf auth login``).

    Raises:
        UserError: nothing there, or the folder lacks a file that a saved policy has.
    """
    folder = Path(path).expanduser()
    if not folder.exists():
        looks_like_repo = path.count("/") == 1 and not path.startswith((".", "/", "~"))
        if not looks_like_repo:
            raise UserError(OPTION, f"there is no folder {path}")
        folder = _download(path, revision, token)
    if not folder.is_dir():
        raise UserError(OPTION, f"{path} is a file; name the folder that holds {CONFIG}")
    nested = folder / "pretrained_model"
    if not (folder / CONFIG).exists() and (nested / CONFIG).exists():
        folder = nested  # a checkpoint folder of lerobot-train
    _check_whole(folder)
    return folder


def _check_whole(folder: Path) -> None:
    """Refuse a folder that lacks a file which a saved policy has, and say what is there instead."""
    missing = [] if (folder / CONFIG).is_file() else [CONFIG]
    if not missing and is_peft(folder):
        missing += [name for name in (PEFT_CONFIG, PEFT_WEIGHTS) if not (folder / name).is_file()]
        if missing and has_weights(folder):
            raise UserError(
                OPTION,
                f"{folder / CONFIG} says use_peft, but {' and '.join(missing)} is not there, only "
                "whole weights; if the LoRA has been merged into them, set use_peft to false",
            )
    elif not has_weights(folder):
        missing.append(WEIGHTS)
    processors = [name for name in (PREPROCESSOR, POSTPROCESSOR) if not (folder / name).is_file()]
    if len(processors) < 2 or missing or not holds_statistics(folder):
        missing += processors
    if not missing:
        return
    there = sorted(file.name for file in folder.iterdir()) or ["nothing"]
    inside = sorted(folder.glob(f"checkpoints/*/pretrained_model/{CONFIG}"))
    if inside:
        hint = f"its last checkpoint is {inside[-1].parent}"
    elif WEIGHTS in missing and any(folder.glob("model-*-of-*.safetensors")):
        hint = f"{WEIGHTS_INDEX}, which says what lies in which shard, was not copied"
    elif missing == processors:
        hint = (
            "LeRobot has written them since 0.4; a checkpoint from before holds its statistics among the "
            "weights, and this one holds none there"
        )
    else:
        hint = "`lerobot-train` writes one under checkpoints/<step>/pretrained_model"
    shown = ", ".join(there[:12]) + (f" and {len(there) - 12} more" if len(there) > 12 else "")
    raise UserError(
        OPTION,
        f"{folder} is not a whole policy folder, it lacks {', '.join(missing)} (it holds {shown}); {hint}",
    )


def holds_statistics(folder: Path) -> bool:
    """Whether the statistics lie among the weights, as LeRobot kept them before it saved processors (0.4)."""
    if not has_weights(folder) or is_peft(folder):
        return False
    return any(
        name.startswith(OLD_STATISTICS) for path in whole_weights(folder) for name in tensor_names(path)
    )


def _download(repo: str, revision: str | None, token: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]  # tokenizers may lie beside
        return Path(snapshot_download(repo, revision=revision, token=token, allow_patterns=patterns))
    except Exception as error:  # the Hub client has a dozen exceptions for "not available"
        wanted = f"{repo} at revision {revision}" if revision else repo
        raise UserError(
            OPTION,
            f"neither a folder nor a reachable Hub repository: {wanted} "
            f"({type(error).__name__}: {reason(error)})",
        ) from None


def commit_of(folder: Path | str) -> str | None:
    """The commit whose files a folder in the Hub's cache holds; ``None`` of any other folder."""
    known = isinstance(folder, Path) and folder.parent.name == "snapshots"
    return folder.name if known else None


def is_peft(folder: Path) -> bool:
    """Whether the folder's weights are those of a PEFT (LoRA) adapter: by ``use_peft``, as for LeRobot.

    Raises:
        UserError: it holds an adapter and whole weights, and its config does not say which counts.
    """
    said = read_json(folder / CONFIG).get("use_peft") if (folder / CONFIG).is_file() else None
    adapter = (folder / PEFT_CONFIG).is_file() or (folder / PEFT_WEIGHTS).is_file()
    if not has_weights(folder):
        return said is True or adapter
    if adapter and not isinstance(said, bool):
        raise UserError(
            OPTION,
            f"{folder} holds whole weights and a LoRA ({PEFT_WEIGHTS}), and its {CONFIG} does not say which "
            "counts: set use_peft to true (the LoRA, on its base) or to false (the whole weights)",
        )
    return said is True


def peft_base(folder: Path, base_path: str | None, token: str | None = None) -> Path:
    """The folder of the policy that a PEFT checkpoint adapts.

    Args:
        folder: the PEFT checkpoint.
        base_path: where the base lies now; default: what the checkpoint says.

    Raises:
        UserError: no base is named, or none is there.
    """
    saved = read_json(folder / PEFT_CONFIG)
    named = base_path or saved.get("base_model_name_or_path")
    if not named:
        raise UserError(OPTION, f"{folder / PEFT_CONFIG} names no base policy; add --policy.base_path=")
    option = "--policy.base_path"
    try:
        base = resolve_folder(named, None if base_path else saved.get("revision"), token)
    except UserError as error:
        raise UserError(
            option, f"the base policy of the LoRA checkpoint {folder} was not found: {error.message}"
        ) from None
    if is_peft(base):
        raise UserError(option, f"{base} is a LoRA checkpoint itself; name the policy below both, merged")
    return base


def read_policy_type(folder: Path) -> str:
    """The ``type`` in a policy folder's config.json.

    Raises:
        UserError: not JSON, or no type.
    """
    raw = read_json(folder / CONFIG)
    policy_type = raw.get("type")
    if isinstance(policy_type, str):
        return policy_type
    keys = ", ".join(list(raw)[:8]) or "nothing"
    whose = "it is not the config of a LeRobot policy"
    if isinstance(raw.get("model_type"), str):
        whose = f"it is the config of another library's '{raw['model_type']}' model"
    elif "input_shapes" in raw:
        whose = "LeRobot wrote such configs before 2025, and reads them no more"
    raise UserError(OPTION, f"{folder / CONFIG} has no 'type' (it holds {keys}): {whose}")


def read_processor_steps(path: Path) -> dict[str, dict[str, Any]]:
    """The steps of a saved processor by the names that LeRobot's overrides go by, with their configs.

    Raises:
        UserError: not JSON.
    """
    return {step_name(step): step.get("config") or {} for step in raw_steps(path)}


def raw_steps(path: Path) -> list[dict[str, Any]]:
    """The entries of a saved processor's ``steps``; none where there is no such list."""
    steps = read_json(path).get("steps")
    return [step for step in steps if isinstance(step, dict)] if isinstance(steps, list) else []


def step_name(step: dict[str, Any]) -> str:
    """The name of a saved step that LeRobot's overrides go by."""
    return str(step.get("registry_name") or str(step.get("class", "")).rpartition(".")[2])


def read_weights(path: Path, option: str = OPTION, unchecked: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Read a safetensors file.

    Args:
        path: the file.
        option: what the user has to change where it is broken.
        unchecked: prefixes of tensors that may hold NaN or Inf.

    Raises:
        UserError: truncated, corrupt, or holding NaN or Inf.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(str(path))
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(option, f"{path} is truncated or no safetensors file ({reason(error)})") from None
    for name, tensor in tensors.items():
        if name.startswith(unchecked) and unchecked:
            continue
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(option, f"{path} holds NaN or Inf in '{name}'")
    return tensors


def weights_files(folder: Path, base_path: str | None = None) -> list[Path]:
    """The files with a policy's weights; of a PEFT checkpoint the adapter's and then its base's.

    Raises:
        UserError: the base of a PEFT checkpoint is not there; what counts cannot be told.
    """
    if is_peft(folder):
        return [folder / PEFT_WEIGHTS, *whole_weights(peft_base(folder, base_path))]
    return whole_weights(folder)


def hash_files(paths: Iterable[Path]) -> str:
    """SHA-256 over the bytes of files, one after another, as hex."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def file_hash(folder: Path, base_path: str | None = None) -> str:
    """SHA-256 of a policy folder's weights, as hex; of a PEFT checkpoint, the adapter's and its base's."""
    return hash_files(weights_files(folder, base_path))


def settings_hashes(folder: Path, parts: Mapping[str, Path] | None = None) -> dict[str, str]:
    """SHA-256 of every file beside the weights that decides what a policy computes, by name.

    These are the policy's config, both processors and their statistics, a PEFT adapter's config, and the
    config and weights of each frozen part outside the checkpoint. JSON files are hashed by their content
    without what may differ on another machine: devices, entries about the Hub (``ELSEWHERE``), and every
    string that is a path or the name of a Hub repository (it holds a slash and no space). Tokenizers are
    not covered.

    Args:
        folder: the policy's.
        parts: folders of the frozen parts, by name.
    """
    hashes = {}
    names = [CONFIG, PREPROCESSOR, POSTPROCESSOR, *([PEFT_CONFIG] if is_peft(folder) else [])]
    for name in names:
        if not (folder / name).is_file():
            continue
        hashes[name] = _json_hash(read_json(folder / name))
    for name in state_files(folder):
        if (folder / name).is_file():
            hashes[name] = hash_files([folder / name])
    for part, place in (parts or {}).items():
        if (place / CONFIG).is_file():
            hashes[f"{part}/{CONFIG}"] = _json_hash(read_json(place / CONFIG))
        for path in part_weights(place):
            hashes[f"{part}/{path.name}"] = hash_files([path])
    return hashes


def state_files(folder: Path) -> list[str]:
    """Names of the files that the saved processors in ``folder`` keep their statistics in."""
    names = [
        step.get("state_file")
        for name in (PREPROCESSOR, POSTPROCESSOR)
        if (folder / name).is_file()
        for step in raw_steps(folder / name)
    ]
    return [name for name in names if isinstance(name, str)]


def _json_hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(_portable(content), sort_keys=True).encode()).hexdigest()


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
