"""In what the learner's hidden layers are multiplied."""

from __future__ import annotations

import sys

import torch

from trimtab.adapters import UserError

PRECISIONS = ("float32", "bfloat16")


def require_precision(option: str, name: str) -> None:
    """Raise a UserError unless ``name`` is a known precision."""
    if name not in PRECISIONS:
        raise UserError(option, f"'{name}' is none of {', '.join(PRECISIONS)}")


def has_bfloat16(device: torch.device) -> bool:
    """Whether ``device`` has instructions for products of bfloat16; without them they are slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


def matmul_dtype(option: str, precision: str, device: torch.device) -> torch.dtype | None:
    """For ``matmuls_in``; where the device has no bfloat16, ``None`` with a line on stderr."""
    if precision == "float32":
        return None
    if not has_bfloat16(device):
        print(f"{option}={precision}: this {device.type} has no bfloat16; float32 it is", file=sys.stderr)
        return None
    return torch.bfloat16
