"""Load a LeRobot policy folder into an adapter, and prove that what was loaded is what was saved."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.adapters.base import PolicyAdapter, adapter_class, adapter_types
from trimtab.adapters.errors import UserError

OPTION = "--policy.path"
WEIGHTS = "model.safetensors"
CONFIG = "config.json"
PREPROCESSOR = "policy_preprocessor.json"
POSTPROCESSOR = "policy_postprocessor.json"

# Policies whose sampling has no continuous noise to steer.
NO_NOISE = {
    "act": "it decodes one chunk from the observation and draws no noise",
    "pi0_fast": "it writes action tokens one after another and draws no noise",
    "vqbet": "it draws categorical codes, not continuous noise",
    "tdmpc": "it plans with a learnt model instead of denoising",
    "gaussian_actor": "it is itself an RL actor",
}


@dataclass
class PolicyConfig:
    """The base policy: ``--policy.path`` and how to load it."""

    # Folder that `lerobot-train` or `trimtab base` wrote, or a Hub repository.
    path: str | None = None
    # Revision on the Hub: branch, tag or commit.
    revision: str | None = None
    # Device of the base policy (cpu, cuda, mps); default: the best there is.
    device: str | None = None
    # Denoising steps; default: as saved (10 where a DDPM checkpoint is switched to DDIM).
    num_inference_steps: int | None = None


def load_adapter(config: PolicyConfig) -> PolicyAdapter:
    """Load, check, freeze and wrap the policy that ``config`` names.

    Raises:
        UserError: the folder is missing, half-written or broken; the type cannot be steered; the policy
            samples at random or ignores its noise.
    """
    if not config.path:
        raise UserError(OPTION, "name the folder or Hub repository of the base policy")
    if config.num_inference_steps is not None and config.num_inference_steps < 1:
        raise UserError(
            "--policy.num_inference_steps", f"must be at least 1, got {config.num_inference_steps}"
        )
    folder = resolve_folder(config.path, config.revision)
    policy_type = read_policy_type(folder)
    cls = adapter_class(policy_type)
    if cls is None:
        raise UserError(OPTION, _no_adapter(policy_type))
    device = config.device or best_device()
    adapter = _build(cls, folder, device, config.num_inference_steps)
    adapter.verify()
    return adapter


def best_device() -> str:
    """The accelerator if there is one, else the CPU."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def resolve_folder(path: str, revision: str | None = None) -> Path:
    """Return the local folder of a policy, fetching it from the Hub where ``path`` is a repository.

    Raises:
        UserError: nothing there, or the folder lacks a file that a saved policy has.
    """
    folder = Path(path).expanduser()
    if not folder.exists():
        looks_like_repo = path.count("/") == 1 and not path.startswith((".", "/", "~"))
        if not looks_like_repo:
            raise UserError(OPTION, f"there is no folder {path}")
        folder = _download(path, revision)
    if not folder.is_dir():
        raise UserError(OPTION, f"{path} is a file; name the folder that holds {CONFIG}")
    nested = folder / "pretrained_model"
    if not (folder / CONFIG).exists() and (nested / CONFIG).exists():
        folder = nested  # a checkpoint folder of lerobot-train
    missing = [n for n in (CONFIG, WEIGHTS, PREPROCESSOR, POSTPROCESSOR) if not (folder / n).is_file()]
    if missing:
        raise UserError(
            OPTION,
            f"{path} is not a whole policy folder, it lacks {', '.join(missing)}; "
            "`lerobot-train` writes one under checkpoints/<step>/pretrained_model",
        )
    return folder


def _download(repo: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # the Hub client has a dozen exceptions for "not available"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            OPTION, f"neither a folder nor a reachable Hub repository: {repo} ({reason})"
        ) from None


def read_policy_type(folder: Path) -> str:
    """The ``type`` in a policy folder's config.json.

    Raises:
        UserError: not JSON, or no type.
    """
    try:
        raw = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(
            OPTION, f"{folder / CONFIG} is not JSON ({error}); the folder is half-written"
        ) from None
    policy_type = raw.get("type") if isinstance(raw, dict) else None
    if not isinstance(policy_type, str):
        raise UserError(OPTION, f"{folder / CONFIG} has no 'type'; it is not the config of a LeRobot policy")
    return policy_type


def _no_adapter(policy_type: str) -> str:
    if policy_type in NO_NOISE:
        return f"a policy of type '{policy_type}' cannot be steered: {NO_NOISE[policy_type]}"
    return (
        f"no adapter for policies of type '{policy_type}' yet; there is one for {', '.join(adapter_types())} "
        "(write your own: adapters/README.md)"
    )


def _build(
    cls: type[PolicyAdapter], folder: Path, device: str, num_inference_steps: int | None
) -> PolicyAdapter:
    from lerobot.configs import PreTrainedConfig
    from lerobot.policies.factory import get_policy_class, make_pre_post_processors

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError("--policy.device", f"'{device}' is not usable here ({error})") from None
    try:
        policy_config = PreTrainedConfig.from_pretrained(str(folder))
        policy_config.device = device
        policy_config.pretrained_path = folder
        notes = cls.prepare_config(policy_config, num_inference_steps)
        saved = read_weights(folder / WEIGHTS)
        policy = get_policy_class(policy_config.type)(policy_config)
    except UserError:
        raise
    except Exception as error:
        raise UserError(OPTION, f"{folder} cannot be loaded: {_first_line(error)}") from None
    load_weights(policy, saved, folder / WEIGHTS)
    policy.to(device)
    freeze(policy)
    try:
        pre, post = make_pre_post_processors(
            policy_config,
            pretrained_path=str(folder),
            preprocessor_overrides={"device_processor": {"device": device}},
        )
    except Exception as error:
        raise UserError(
            OPTION, f"the processors in {folder} cannot be loaded: {_first_line(error)}"
        ) from None
    adapter = cls(policy, pre, post)
    adapter.notes = notes
    return adapter


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
        raise UserError(
            OPTION, f"{path} is truncated or no safetensors file ({_first_line(error)})"
        ) from None
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(OPTION, f"{path} holds NaN or Inf in '{name}'")
    return tensors


def load_weights(policy: torch.nn.Module, saved: dict[str, Tensor], path: Path) -> None:
    """Load ``saved`` and check every tensor of the model against it, bit for bit.

    LeRobot loads with ``strict=False`` by default, and some policies return random weights when the
    file is missing. Shared tensors are saved once; their other names are found by their storage.

    Raises:
        UserError: a tensor is missing, extra, or of another shape.
    """
    state = policy.state_dict()
    extra = sorted(set(saved) - set(state))
    wrong = [n for n in saved if n in state and state[n].shape != saved[n].shape]
    covered = {state[n].data_ptr() for n in saved if n in state}
    missing = sorted(n for n in state if n not in saved and state[n].data_ptr() not in covered)
    if extra or wrong or missing:
        parts = [
            f"{len(names)} tensors {what} (first: {names[0]})"
            for names, what in ((missing, "missing"), (extra, "unknown"), (wrong, "of another shape"))
            if names
        ]
        raise UserError(
            OPTION, f"{path} does not fit the policy that its config describes: {'; '.join(parts)}"
        )
    policy.load_state_dict(saved, strict=False)
    for name, tensor in policy.state_dict().items():
        if name in saved and not torch.equal(tensor, saved[name].to(tensor)):
            raise UserError(OPTION, f"'{name}' differs from {path} after loading")


def freeze(policy: torch.nn.Module) -> None:
    """Eval mode, no gradients."""
    policy.eval()
    for parameter in policy.parameters():
        parameter.requires_grad_(False)


def file_hash(folder: Path) -> str:
    """SHA-256 of a policy folder's weights file, as hex."""
    digest = hashlib.sha256()
    with open(folder / WEIGHTS, "rb") as file:
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


def _first_line(error: Any) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
