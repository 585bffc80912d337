"""Batches of random transitions, for losses against references written by hand."""

from __future__ import annotations

import torch
from torch import Tensor


def transitions(features: int, chunk: int, candidates: int) -> dict[str, Tensor]:
    """Six transitions with stored candidates, as after ``encode_batch``, always the same; one is terminal."""
    discount = torch.tensor([0.9, 0.0, 0.8, 0.9, 0.5, 0.7])
    size, generator = len(discount), torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "features": draw(size, features),
        "u": draw(size, 2),
        "reward": -draw(size).abs(),
        "discount": discount,
        "next_features": draw(size, features),
        "chunk": draw(size, chunk),
        "candidates": draw(size, candidates, chunk),
        "candidates_u": draw(size, candidates, 2),
        "next_candidates": draw(size, candidates, chunk),
    }
