"""The files of a saved policy: find them, read them, hash them. Nothing is unpickled."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.adapters.errors import UserError, reason

OPTION = "--policy.path"
WEIGHTS = "model.safetensors"
CONFIG = "config.json"
PREPROCESSOR = "policy_preprocessor.json"
POSTPROCESSOR = "policy_postprocessor.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
# Where transformers and diffusers look for the weights of a part, in their order.
PART_WEIGHTS = (
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    "model.safetensors",
    "model.safetensors.index.json",
)
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
    weights = PEFT_WEIGHTS if is_peft(folder) else WEIGHTS
    missing = [n for n in (CONFIG, weights, PREPROCESSOR, POSTPROCESSOR) if not (folder / n).is_file()]
    if missing:
        raise UserError(
            OPTION,
            f"{path} is not a whole policy folder, it lacks {', '.join(missing)}; "
            "`lerobot-train` writes one under checkpoints/<step>/pretrained_model",
        )
    return folder


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
    """Whether the folder holds a PEFT (LoRA) adapter instead of whole weights."""
    return (folder / PEFT_CONFIG).is_file() and not (folder / WEIGHTS).is_file()


def peft_base(folder: Path, base_path: str | None, token: str | None = None) -> Path:
    """The folder of the policy that a PEFT checkpoint adapts.

    Args:
        folder: the PEFT checkpoint.
        base_path: where the base lies now; default: what the checkpoint says.

    Raises:
        UserError: no base is named, or none is there.
    """
    saved = _read_json(folder / PEFT_CONFIG)
    named = base_path or saved.get("base_model_name_or_path")
    if not named:
        raise UserError(OPTION, f"{folder / PEFT_CONFIG} names no base policy; add --policy.base_path=")
    try:
        return resolve_folder(named, None if base_path else saved.get("revision"), token)
    except UserError as error:
        option = "--policy.base_path"
        raise UserError(
            option, f"the base policy of the LoRA checkpoint {folder} was not found: {error.message}"
        ) from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(OPTION, f"{path} is not JSON ({error}); the folder is half-written") from None
    return raw if isinstance(raw, dict) else {}


def read_policy_type(folder: Path) -> str:
    """The ``type`` in a policy folder's config.json.

    Raises:
        UserError: not JSON, or no type.
    """
    raw = _read_json(folder / CONFIG)
    policy_type = raw.get("type")
    if not isinstance(policy_type, str):
        raise UserError(OPTION, f"{folder / CONFIG} has no 'type'; it is not the config of a LeRobot policy")
    return policy_type


def read_processor_steps(path: Path) -> dict[str, dict[str, Any]]:
    """The steps of a saved processor by the names that LeRobot's overrides go by, with their configs.

    Raises:
        UserError: not JSON.
    """
    steps = _read_json(path).get("steps") or []
    named = {s.get("registry_name") or str(s.get("class", "")).rpartition(".")[2]: s for s in steps}
    return {name: step.get("config") or {} for name, step in named.items()}


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


def part_weights(folder: Path, option: str = OPTION) -> list[Path]:
    """The safetensors files of a model that transformers or diffusers saved, whole or in shards.

    Raises:
        UserError: there are none.
    """
    name = next((name for name in PART_WEIGHTS if (folder / name).is_file()), None)
    if name is None:
        raise UserError(option, f"{folder} holds no weights in safetensors files")
    if not name.endswith(".index.json"):
        return [folder / name]
    shards = _read_json(folder / name).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise UserError(option, f"{folder / name} names no shards")
    return [folder / shard for shard in sorted(set(shards.values()))]


def weights_files(folder: Path, base_path: str | None = None) -> list[Path]:
    """The files with a policy's weights: one, or of a PEFT checkpoint the adapter's and its base's.

    Raises:
        UserError: the base of a PEFT checkpoint is not there.
    """
    if is_peft(folder):
        return [folder / PEFT_WEIGHTS, peft_base(folder, base_path) / WEIGHTS]
    return [folder / WEIGHTS]


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
        hashes[name] = _json_hash(_read_json(folder / name))
    for name in state_files(folder):
        if (folder / name).is_file():
            hashes[name] = hash_files([folder / name])
    for part, place in (parts or {}).items():
        if (place / CONFIG).is_file():
            hashes[f"{part}/{CONFIG}"] = _json_hash(_read_json(place / CONFIG))
        for path in part_weights(place):
            hashes[f"{part}/{path.name}"] = hash_files([path])
    return hashes


def state_files(folder: Path) -> list[str]:
    """Names of the files that the saved processors in ``folder`` keep their statistics in."""
    steps = []
    for name in (PREPROCESSOR, POSTPROCESSOR):
        if (folder / name).is_file():
            steps += _read_json(folder / name).get("steps") or []
    return [step["state_file"] for step in steps if "state_file" in step]


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
