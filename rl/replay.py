"""A ring buffer of transitions with uniform sampling."""

from __future__ import annotations

import math
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

    Attributes:
        added: transitions ever added; the n-th lies in row ``n % capacity``.
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
        self.added = 0
        self._next = 0
        self._device = torch.device(device)
        self._generator = torch.Generator().manual_seed(seed)
        self._extra = list(extra or {})
        self._data: Batch = {
            name: torch.zeros(capacity, *shape, dtype=dtype)
            for name, (shape, dtype) in layout(feature_dim, action_dim, extra, precise).items()
        }

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
        self.added += 1
        self._next = self.added % self.capacity
        self.size = min(self.size + 1, self.capacity)

    def sample(self, batch_size: int) -> Batch:
        """Draw ``batch_size`` transitions uniformly, with replacement."""
        index = torch.randint(self.size, (batch_size,), generator=self._generator)
        return {name: value[index].to(self._device, torch.float32) for name, value in self._data.items()}

    def all_features(self) -> Tensor:
        """The stored features (size, d)."""
        return self._data["features"][: self.size]

    def rows(self, start: int, stop: int) -> Batch:
        """The transitions from the ``start``-th to before the ``stop``-th ever added, as they are stored."""
        index = torch.arange(start, stop) % self.capacity
        return {name: value[index] for name, value in self._data.items()}

    def put(self, start: int, rows: Batch) -> None:
        """Take up ``rows`` as the transitions from the ``start``-th on, after a checkpoint.

        Raises:
            ValueError: they are not what this replay stores.
        """
        count = len(next(iter(rows.values())))
        for name, value in self._data.items():
            if name not in rows or rows[name].shape[1:] != value.shape[1:] or rows[name].dtype != value.dtype:
                raise ValueError(f"the replay of the checkpoint has another '{name}' than this run stores")
            kept = rows[name][-self.capacity :]
            value[torch.arange(start + count - len(kept), start + count) % self.capacity] = kept
        self.added = start + count
        self._next, self.size = self.added % self.capacity, min(self.size + count, self.capacity)

    def state_dict(self) -> dict[str, Tensor]:
        """All but the transitions: the state of the sampling."""
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._generator.set_state(state["generator"])


def layout(
    feature_dim: int, action_dim: int, extra: dict[str, tuple[int, ...]] | None, precise: Container[str]
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each entry of a stored transition, by name; arguments as for ``ReplayBuffer``."""
    found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "features": ((feature_dim,), torch.float32),
        "u": ((action_dim,), torch.float32),
        "reward": ((), torch.float32),
        "discount": ((), torch.float32),
        "next_features": ((feature_dim,), torch.float32),
    }
    for name, shape in (extra or {}).items():
        found[name] = shape, torch.float32 if name in precise else torch.float16
    return found


def transition_bytes(
    feature_dim: int, action_dim: int, extra: dict[str, tuple[int, ...]] | None, precise: Container[str]
) -> int:
    """Memory of one stored transition; arguments as for ``ReplayBuffer``."""
    entries = layout(feature_dim, action_dim, extra, precise).values()
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in entries)
