"""Put saved weights into a policy, and prove that what is in memory is what lies in the files."""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.modules.module import register_module_parameter_registration_hook

from trimtab.adapters.checkpoint.files import (
    BACKBONE,
    OPTION,
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    each_weight,
    part_weights,
    read_weights,
)
from trimtab.adapters.errors import UserError, policy_error, reason

Values = Callable[[], Iterable[tuple[str, Tensor]]]
COMPILED = "_orig_mod."
# A policy may hold what its file does not (frozen encoders, layers that are cut off): so many times more
# parameters than the file, and as many more besides.
TIMES_MORE, BESIDES = 4, 5 * 10**8


def plain_names(saved: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors of a policy that was saved compiled, under the names of the plain one.

    ``torch.compile`` puts ``_orig_mod`` before the names of what it wraps.
    """
    plain: dict[str, Tensor] = {}
    for name, tensor in saved.items():
        short = name.replace(COMPILED, "")
        if short in plain:
            raise policy_error(f"{path} holds '{short}' twice, once as torch.compile names it")
        plain[short] = tensor
    return plain


@contextmanager
def no_larger_than(saved: dict[str, Tensor], path: Path) -> Iterator[None]:
    """Refuse to build a policy that is far larger than its weights, before it takes all memory.

    A part's config that is missing or empty stands for a library's standard model of several billion.
    """
    size = sum(tensor.numel() for tensor in saved.values())
    built = 0

    def count(module: torch.nn.Module, name: str, parameter: Any) -> None:
        nonlocal built
        if parameter is not None and parameter.device.type != "meta":
            built += parameter.numel()
        if built > TIMES_MORE * size + BESIDES:
            raise policy_error(
                f"{path} holds {size:,} numbers, and the policy that its config describes far more "
                f"(over {built:,}): look for a part's config that is missing or empty"
            )

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def check_names(
    state: Mapping[str, Tensor], saved: Mapping[str, Tensor], path: Path, option: str = OPTION
) -> None:
    """Refuse a missing, extra or misshapen tensor; tensors of a model that share storage count as one."""
    covered = {state[name].data_ptr() for name in saved if name in state}
    odd = {
        "missing": [n for n in state if n not in saved and state[n].data_ptr() not in covered],
        "unknown": [n for n in saved if n not in state],
        "of another shape": [n for n in saved if n in state and state[n].shape != saved[n].shape],
    }
    parts = [f"{len(n)} tensors {what} (first: {min(n)})" for what, n in odd.items() if n]
    if parts:
        raise UserError(
            option, f"{path} does not fit the policy that its config describes: {'; '.join(parts)}"
        )


def check_values(
    state: Mapping[str, Tensor], saved: Mapping[str, Tensor], path: Path, option: str = OPTION
) -> None:
    """Refuse saved tensors that differ from a model's, bit for bit up to its precision."""
    for name, tensor in saved.items():
        if name in state and not torch.equal(state[name], tensor.to(state[name])):
            raise UserError(option, f"'{name}' differs from {path} after loading")


def load_weights(
    policy: torch.nn.Module, saved: dict[str, Tensor], path: Path, values: Values | None = None
) -> None:
    """Load ``saved`` and check every tensor of the model against it.

    LeRobot loads with ``strict=False``. Shared tensors are saved once, and known by their storage. ``values``
    gives the entries of ``saved`` once more at each call, where they are not to stay in memory.
    """
    values, state = values or saved.items, policy.state_dict()
    check_names(state, saved, path)
    for name, tensor in values():
        state[name].copy_(tensor)
    state = policy.state_dict()
    for name, tensor in values():
        check_values(state, {name: tensor}, path)


def one_by_one(
    saved: Mapping[str, Tensor], read: Mapping[str, Tensor], files: Iterable[Path]
) -> Iterator[tuple[str, Tensor]]:
    """The entries of ``saved``: of each its values from the ``files``, whose tensors ``read`` has by name.

    So a model's weights are in memory once, and not beside it those of all files.
    """
    names: dict[int, list[str]] = {}
    for name, tensor in saved.items():
        names.setdefault(id(tensor), []).append(name)
    for _, name, tensor in each_weight(files):
        yield from ((new, tensor) for new in names.pop(id(read[name]), ()))
    yield from ((name, saved[name]) for made in names.values() for name in made)


def check_part(module: torch.nn.Module, folder: Path) -> None:
    """Compare a frozen part outside the checkpoint with its files: its library draws what a file lacks."""
    state = module.state_dict()
    known: dict[str, Tensor] = {}
    for path in part_weights(folder, BACKBONE):
        # Without what the files hold beside, such as UMT5's decoder.
        saved = {name: tensor for name, tensor in read_weights(path, BACKBONE).items() if name in state}
        check_values(state, saved, path, BACKBONE)
        known |= {name: tensor.to("meta") for name, tensor in saved.items()}
    check_names(state, known, folder, BACKBONE)


def load_peft(policy: torch.nn.Module, folder: Path) -> None:
    """Put a PEFT (LoRA) adapter into ``policy``, unmerged as LeRobot runs it; compare it with its file."""
    from peft import PeftModel, get_peft_model_state_dict

    path = folder / PEFT_WEIGHTS
    saved = read_weights(path)
    compiled = any(COMPILED in name for name in saved)
    saved = plain_names(saved, path)
    try:
        with tempfile.TemporaryDirectory() as plain:
            if compiled:  # LeRobot compiles a diffusion policy's U-Net; here it runs as it is
                save_file(saved, Path(plain) / PEFT_WEIGHTS)
                text = (folder / PEFT_CONFIG).read_text(encoding="utf-8").replace(COMPILED, "")
                (Path(plain) / PEFT_CONFIG).write_text(text, encoding="utf-8")
            where = plain if compiled else str(folder)
            loaded = PeftModel.from_pretrained(policy, where, is_trainable=False)
    except Exception as error:
        raise policy_error(f"{folder} does not fit its base policy: {reason(error)}") from error
    state: dict[str, Any] = get_peft_model_state_dict(loaded)
    check_names(state, saved, path)
    check_values(state, saved, path)
