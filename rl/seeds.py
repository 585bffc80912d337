"""Seeds of training, far from those of evaluation, demonstrations and other runs; torch's RNG state."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_SEED = 20_000  # keeps environment seeds below 2^31
SEEDS_PER_RUN = 100_000


def training_seed(seed: int) -> int:
    """First environment seed of the run ``seed``."""
    return 100_000_000 + seed * SEEDS_PER_RUN


def rng_state(device: torch.device) -> dict[str, Tensor | None]:
    """State of torch's own generators, of the CPU and of a GPU."""
    return {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_rng_state(state: dict[str, Tensor | None], device: torch.device) -> None:
    """The inverse of ``rng_state``."""
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
