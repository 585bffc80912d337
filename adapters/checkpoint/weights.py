"""Put saved weights into a policy, and prove that what is in memory is what lies in the files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import register_module_parameter_registration_hook

from trimtab.adapters.checkpoint.files import OPTION, PEFT_WEIGHTS, part_weights, read_weights
from trimtab.adapters.errors import UserError, reason

BACKBONE = "--policy.backbone"
COMPILED = "_orig_mod."
# A policy may hold what its file does not (frozen encoders, layers that are cut off): so many times more
# parameters than the file, and as many more besides.
TIMES_MORE, BESIDES = 4, 5 * 10**8


def read_tensors(
    paths: Iterable[Path], option: str = OPTION, unchecked: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """``read_weights`` of a model that may lie in shards.

    Raises:
        UserError: a file is broken, or two hold a tensor of one name.
    """
    tensors: dict[str, Tensor] = {}
    for path in paths:
        part = read_weights(path, option, unchecked)
        twice = sorted(tensors.keys() & part.keys())
        if twice:
            raise UserError(option, f"{path} holds '{twice[0]}', which an earlier shard holds too")
        tensors |= part
    return tensors


def plain_names(saved: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors of a policy that was saved compiled, under the names of the plain one.

    ``torch.compile`` puts ``_orig_mod`` before the names of what it wraps.

    Raises:
        UserError: a name is there twice, with and without.
    """
    plain: dict[str, Tensor] = {}
    for name, tensor in saved.items():
        own = name.replace(COMPILED, "")
        if own in plain:
            raise UserError(OPTION, f"{path} holds '{own}' twice, once as torch.compile names it")
        plain[own] = tensor
    return plain


@contextmanager
def no_larger_than(saved: dict[str, Tensor], path: Path) -> Iterator[None]:
    """Stop building a policy that is far larger than its weights, before it takes all memory.

    A part's config that is missing or empty stands for a library's standard model of several billion.

    Raises:
        UserError: the policy is far larger.
    """
    held = sum(tensor.numel() for tensor in saved.values())
    built = 0

    def count(module: torch.nn.Module, name: str, parameter: Any) -> None:
        nonlocal built
        if parameter is not None and parameter.device.type != "meta":
            built += parameter.numel()
        if built > TIMES_MORE * held + BESIDES:
            raise UserError(
                OPTION,
                f"{path} holds {held:,} numbers, and the policy that its config describes far more "
                f"(over {built:,}): look for a part's config that is missing or empty",
            )

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


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


def check_part(module: torch.nn.Module, folder: Path, name: str) -> None:
    """Compare a frozen part outside the checkpoint with its files, bit for bit up to its precision.

    Its library fills what a file lacks with random numbers. Shared tensors are found by their storage; what
    the file holds beside (UMT5's decoder) is not looked at.

    Args:
        module: the part in memory.
        folder: where transformers or diffusers saved it, whole or in shards.
        name: of the part, for the message.

    Raises:
        UserError: a tensor is missing or differs; a file is broken.
    """
    state = module.state_dict()
    covered: set[int] = set()
    for path in part_weights(folder, BACKBONE):
        for key, tensor in read_weights(path, BACKBONE).items():
            if key not in state:
                continue
            held = state[key]
            if held.shape != tensor.shape or not torch.equal(held, tensor.to(held)):
                raise UserError(BACKBONE, f"'{key}' of the {name} differs from {path} after loading")
            covered.add(held.data_ptr())
    missing = sorted(key for key, tensor in state.items() if tensor.data_ptr() not in covered)
    if missing:
        raise UserError(
            BACKBONE, f"the {name} in {folder} lacks {len(missing)} tensors (first: {missing[0]})"
        )


def freeze(policy: torch.nn.Module) -> None:
    """Eval mode, no gradients."""
    policy.eval()
    for parameter in policy.parameters():
        parameter.requires_grad_(False)


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
