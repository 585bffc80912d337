"""A ring buffer of transitions with uniform sampling."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from trimtab.rl.returns import Transition

Batch = dict[str, Tensor]


class ReplayBuffer:
    """Holds the last ``capacity`` transitions as float32 tensors.

    Args:
        capacity: number of transitions.
        feature_dim: length of the observation features.
        action_dim: length of ``u``.
        seed: seeds the sampling.
        device: where batches go.
    """

    def __init__(
        self, capacity: int, feature_dim: int, action_dim: int, seed: int, device: str | torch.device = "cpu"
    ) -> None:
        self.capacity = capacity
        self.size = 0
        self._next = 0
        self._device = torch.device(device)
        self._generator = torch.Generator().manual_seed(seed)
        self._data: Batch = {
            "features": torch.zeros(capacity, feature_dim),
            "u": torch.zeros(capacity, action_dim),
            "reward": torch.zeros(capacity),
            "discount": torch.zeros(capacity),
            "next_features": torch.zeros(capacity, feature_dim),
        }

    def __len__(self) -> int:
        return self.size

    def add(self, transition: Transition) -> None:
        """Store a transition; once full, the oldest makes room.

        Raises:
            ValueError: NaN or Inf anywhere in it.
        """
        row = {
            name: torch.as_tensor(np.asarray(getattr(transition, name), dtype=np.float32))
            for name in self._data
        }
        for name, value in row.items():
            if not torch.isfinite(value).all():
                raise ValueError(f"a transition with NaN or Inf in '{name}' was kept out of the replay")
        for name, value in row.items():
            self._data[name][self._next] = value
        self._next = (self._next + 1) % self.capacity
        self.size = min(self.size + 1, self.capacity)

    def sample(self, batch_size: int) -> Batch:
        """Draw ``batch_size`` transitions uniformly, with replacement."""
        index = torch.randint(self.size, (batch_size,), generator=self._generator)
        return {name: value[index].to(self._device) for name, value in self._data.items()}

    def all_features(self) -> Tensor:
        """The stored features (size, d)."""
        return self._data["features"][: self.size]
