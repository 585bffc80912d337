"""A ring buffer of transitions with uniform sampling."""

from __future__ import annotations

from collections.abc import Container

import numpy as np
import torch
from torch import Tensor

from trimtab.rl.frames import FrameStore
from trimtab.rl.returns import Transition

Batch = dict[str, Tensor]
OBSERVED = ("features", "next_features")


class ReplayBuffer:
    """Holds the last ``capacity`` transitions: float32, pixels as uint8, what algorithms add as float16.

    Args:
        capacity: number of transitions.
        feature_dim: length of the observation features, or of packed observations.
        action_dim: length of ``u``.
        seed: seeds the sampling.
        device: where batches go.
        extra: shapes of what ``Transition.extra`` holds, by name; anything else in it is not kept.
        precise: names in ``extra`` that are kept as float32.
        pixels: how many entries at the end of an observation are pixels (``policies/observe.py``).
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
        pixels: int = 0,
    ) -> None:
        self.capacity = capacity
        self.size = 0
        self._next = 0
        self._device = torch.device(device)
        self._generator = torch.Generator().manual_seed(seed)
        self._vector = feature_dim - pixels
        self._frames = FrameStore(pixels) if pixels else None
        self._slots = torch.zeros(capacity, 2, dtype=torch.long)  # frames of the state and of the one after
        self._data: Batch = {
            "features": torch.zeros(capacity, self._vector),
            "u": torch.zeros(capacity, action_dim),
            "reward": torch.zeros(capacity),
            "discount": torch.zeros(capacity),
            "next_features": torch.zeros(capacity, self._vector),
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
            value = value[: self._vector] if name in OBSERVED else value
            row[name] = torch.as_tensor(np.asarray(value, dtype=np.float32)).to(stored.dtype)
        for name, value in row.items():
            if not torch.isfinite(value).all():
                raise ValueError(f"a transition with NaN or Inf in '{name}' was kept out of the replay")
        for name, value in row.items():
            self._data[name][self._next] = value
        if self._frames is not None:
            self._add_frames(self._frames, [getattr(transition, name) for name in OBSERVED])
        self._next = (self._next + 1) % self.capacity
        self.size = min(self.size + 1, self.capacity)

    def _add_frames(self, frames: FrameStore, observations: list[np.ndarray]) -> None:
        if self.size == self.capacity:
            for slot in self._slots[self._next].tolist():
                frames.release(slot)
        for column, observation in enumerate(observations):
            slot = frames.put(np.asarray(observation[self._vector :]).astype(np.uint8))
            self._slots[self._next, column] = slot

    def sample(self, batch_size: int) -> Batch:
        """Draw ``batch_size`` transitions uniformly, with replacement."""
        index = torch.randint(self.size, (batch_size,), generator=self._generator)
        rows = {name: value.index_select(0, index) for name, value in self._data.items()}
        batch = {name: value.to(self._device, torch.float32) for name, value in rows.items()}
        if self._frames is not None:
            for name, slots in zip(OBSERVED, self._slots[index].T, strict=True):
                pixels = self._frames[slots].to(self._device)
                batch[name] = torch.cat([batch[name], pixels.to(torch.float32)], 1)
        return batch

    def all_features(self) -> Tensor:
        """The stored features (size, d), without pixels."""
        return self._data["features"][: self.size]
