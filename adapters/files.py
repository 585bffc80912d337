"""The files of a saved policy: find them, read them, hash them. Nothing is unpickled."""

from __future__ import annotations

import hashlib
import json
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
        raise UserError(
            OPTION, f"neither a folder nor a reachable Hub repository: {repo} ({reason(error)})"
        ) from None


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


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        UserError: truncated, corrupt, or holding NaN or Inf.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(str(path))
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(OPTION, f"{path} is truncated or no safetensors file ({reason(error)})") from None
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(OPTION, f"{path} holds NaN or Inf in '{name}'")
    return tensors


def file_hash(folder: Path, base_path: str | None = None) -> str:
    """SHA-256 of a policy folder's weights, as hex; of a PEFT checkpoint, the adapter's and its base's."""
    digest = hashlib.sha256()
    paths = [folder / WEIGHTS]
    if is_peft(folder):
        paths = [folder / PEFT_WEIGHTS, peft_base(folder, base_path) / WEIGHTS]
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def weights_hash(policy: torch.nn.Module) -> str:
    """SHA-256 over the names and bytes of a model's tensors in memory, as hex."""
    digest = hashlib.sha256()
    for name, tensor in sorted(policy.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
