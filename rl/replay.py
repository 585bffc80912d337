"""A ring buffer of transitions with uniform sampling."""

from __future__ import annotations

from collections.abc import Container

import numpy as np
import torch
from torch import Tensor

from trimtab.rl.returns import Transition

Batch = dict[str, Tensor]


class ReplayBuffer:
    """Holds the last ``capacity`` transitions: float32, and what algorithms add as float16.

    Args:
        capacity: number of transitions.
        feature_dim: length of the observation features.
        action_dim: length of ``u``.
        seed: seeds the sampling.
        device: where batches go.
        extra: shapes of what ``Transition.extra`` holds, by name; anything else in it is not kept.
        precise: names in ``extra`` that are kept as float32.
    """

    def __init__(
        self,
        capacity: int,
        feature_dim: int,
        action_dim: int,
        seed: int,
        device: str | torch.device = "cpu",
        extra: dict[str, tuple[int, ...]] | None = None,
        precise: Container[str] = (),
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
        self._extra = list(extra or {})
        for name, shape in (extra or {}).items():
            dtype = torch.float32 if name in precise else torch.float16
            self._data[name] = torch.zeros(capacity, *shape, dtype=dtype)

    def __len__(self) -> int:
        return self.size

    def add(self, transition: Transition) -> None:
        """Store a transition; once full, the oldest makes room.

        Raises:
            ValueError: NaN or Inf anywhere in it.
        """
        row = {}
        for name, stored in self._data.items():
            value = transition.extra[name] if name in self._extra else getattr(transition, name)
            row[name] = torch.as_tensor(np.asarray(value, dtype=np.float32)).to(stored.dtype)
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
        rows = {name: value.index_select(0, index) for name, value in self._data.items()}
        return {name: value.to(self._device, torch.float32) for name, value in rows.items()}

    def all_features(self) -> Tensor:
        """The stored features (size, d)."""
        return self._data["features"][: self.size]
