"""Load a LeRobot policy folder into an adapter, and prove that what was loaded is what was saved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.adapters.base import PolicyAdapter, adapter_class, adapter_types
from trimtab.adapters.config import DTYPES, PolicyConfig
from trimtab.adapters.errors import UserError, reason
from trimtab.adapters.files import (
    OPTION,
    PEFT_WEIGHTS,
    WEIGHTS,
    is_peft,
    is_server,
    peft_base,
    read_policy_type,
    read_weights,
    resolve_folder,
)

# Policies whose sampling has no continuous noise to steer.
NO_NOISE = {
    "pi0_fast": "it writes action tokens one after another and draws no noise",
    "vqbet": "it draws categorical codes, not continuous noise",
    "tdmpc": "it plans with a learnt model instead of denoising",
    "gaussian_actor": "it is itself an RL actor",
}


def load_adapter(config: PolicyConfig, token: str | None = None) -> PolicyAdapter:
    """Load, check, freeze and wrap the policy that ``config`` names.

    Args:
        config: the policy and how to load it.
        token: Hub token for private repositories; default: the Hub's own (``HF_TOKEN``).

    Raises:
        UserError: the folder is missing, half-written or broken; the type cannot be steered; the policy
            samples at random or ignores its noise; no policy server answers.
    """
    adapter = open_adapter(config, token)
    try:
        adapter.verify()
    except BaseException as error:
        adapter.close()
        if not isinstance(error, (RuntimeError, ValueError, TypeError)):
            raise
        hint = f"; try another --policy.dtype than {config.dtype}" if config.dtype else ""
        raise UserError(OPTION, f"{config.path} loads but does not run: {reason(error)}{hint}") from error
    return adapter


def open_adapter(config: PolicyConfig, token: str | None = None) -> PolicyAdapter:
    """``load_adapter`` without the final ``verify``, for whoever reports what it would find.

    Raises:
        UserError: as ``load_adapter``, less what ``verify`` raises.
    """
    if not config.path:
        raise UserError(OPTION, "name the folder or Hub repository of the base policy")
    if config.num_inference_steps is not None and config.num_inference_steps < 1:
        raise UserError(
            "--policy.num_inference_steps", f"must be at least 1, got {config.num_inference_steps}"
        )
    if config.dtype is not None and config.dtype not in DTYPES:
        raise UserError("--policy.dtype", f"must be one of {', '.join(DTYPES)}, got {config.dtype}")
    if is_server(config.path):
        from trimtab.adapters.remote import RemoteAdapter

        return RemoteAdapter(config, usable_device(config.device))
    folder = resolve_folder(config.path, config.revision, token)
    policy_type = read_policy_type(folder)
    cls = adapter_class(policy_type)
    if cls is None:
        raise UserError(OPTION, _no_adapter(policy_type))
    return _build(cls, folder, config, token)


def best_device() -> str:
    """The accelerator if there is one, else the CPU."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def usable_device(name: str | None) -> str:
    """The device ``name``, or the best there is.

    Raises:
        UserError: it cannot be used here.
    """
    device = name or best_device()
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError("--policy.device", f"'{device}' is not usable here ({error})") from None
    return device


def _no_adapter(policy_type: str) -> str:
    if policy_type in NO_NOISE:
        return f"a policy of type '{policy_type}' cannot be steered: {NO_NOISE[policy_type]}"
    return (
        f"no adapter for policies of type '{policy_type}' yet; there is one for {', '.join(adapter_types())} "
        "(write your own: adapters/README.md)"
    )


def _build(cls: type[PolicyAdapter], folder: Path, options: PolicyConfig, token: str | None) -> PolicyAdapter:
    from lerobot.configs import PreTrainedConfig
    from lerobot.policies.factory import make_pre_post_processors

    device = usable_device(options.device)
    weights_folder = peft_base(folder, options.base_path, token) if is_peft(folder) else folder
    try:
        policy_config = PreTrainedConfig.from_pretrained(str(folder))
        policy_config.device = device
        policy_config.pretrained_path = weights_folder
        if options.dtype and hasattr(policy_config, "dtype"):
            policy_config.dtype = options.dtype
        notes = cls.prepare_config(policy_config, options)
        saved = read_weights(weights_folder / WEIGHTS)
        with quietly():
            policy = cls.build(policy_config)
        saved = cls.prepare_weights(saved, policy)
    except UserError:
        raise
    except Exception as error:
        raise UserError(OPTION, f"{weights_folder} cannot be loaded: {reason(error)}") from error
    load_weights(policy, saved, weights_folder / WEIGHTS)
    if is_peft(folder):
        load_peft(policy, folder)
    policy.to(device)
    if options.dtype and not hasattr(policy_config, "dtype"):
        cast(policy, getattr(torch, options.dtype))
    freeze(policy)
    before, after = cls.processor_overrides(policy_config, options)
    if options.rename_map:
        before = {**before, "rename_observations_processor": {"rename_map": options.rename_map}}
    try:
        pre, post = make_pre_post_processors(
            policy_config,
            pretrained_path=str(folder),
            preprocessor_overrides={"device_processor": {"device": device}, **before},
            postprocessor_overrides=after,
        )
    except Exception as error:
        hint = "" if options.tokenizer else "; a tokenizer that cannot be fetched: --policy.tokenizer=FOLDER"
        raise UserError(
            OPTION, f"the processors in {folder} cannot be loaded: {reason(error)}{hint}"
        ) from error
    adapter = cls(policy, pre, post)
    adapter.notes = notes
    return adapter


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


@contextmanager
def quietly() -> Iterator[None]:
    """Keep back what libraries print while they build a model whose weights are about to be replaced."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with redirect_stdout(StringIO()):
            yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def cast(policy: torch.nn.Module, dtype: torch.dtype) -> None:
    """Change the precision of everything that the weights file holds.

    Other buffers (rotary frequencies, position tables) keep theirs, for they are computed, not learnt.
    """
    for tensor in policy.state_dict(keep_vars=True).values():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)


def load_peft(policy: torch.nn.Module, folder: Path) -> None:
    """Put a PEFT (LoRA) adapter into ``policy``, in place, and check it against its file.

    The layers stay unmerged, as LeRobot runs them.

    Raises:
        UserError: the adapter does not fit the policy.
    """
    from peft import PeftModel, get_peft_model_state_dict

    saved = read_weights(folder / PEFT_WEIGHTS)
    try:
        loaded = PeftModel.from_pretrained(policy, str(folder), is_trainable=False)
    except Exception as error:
        raise UserError(OPTION, f"{folder} does not fit its base policy: {reason(error)}") from error
    state: dict[str, Any] = get_peft_model_state_dict(loaded)
    if set(state) != set(saved):
        odd = sorted(set(state) ^ set(saved))
        raise UserError(OPTION, f"{folder / PEFT_WEIGHTS} lacks or adds {len(odd)} tensors (first: {odd[0]})")
    for name, tensor in state.items():
        if not torch.equal(tensor, saved[name].to(tensor)):
            raise UserError(OPTION, f"'{name}' differs from {folder / PEFT_WEIGHTS} after loading")
