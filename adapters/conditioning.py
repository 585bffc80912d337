"""What an encoded observation is: tensors with a common batch dimension, and how often each row is used."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """All that depends on the observation alone.

    ``repeat_interleave`` copies nothing: it counts. K noises for one observation so share one prefix; an
    adapter asks for ``rows`` of what is small and reads ``tensors`` and ``repeats`` of what is large.

    Attributes:
        tensors: by name, each (N, ...) for N observations.
        lists: by name, each N Python values (strings, for most).
        repeats: noises per observation; row ``i`` of the batch belongs to observation ``i // repeats``.
        observed: (N, d) what a noise actor is to see of each, where ``PolicyAdapter.observer`` says so.
    """

    tensors: dict[str, Tensor]
    lists: dict[str, list[Any]] = field(default_factory=dict)
    repeats: int = 1
    observed: Tensor | None = None

    @property
    def observations(self) -> int:
        """Number N of observations."""
        entries: dict[str, Any] = {**self.tensors, **self.lists}
        return len(next(iter(entries.values())))

    @property
    def batch_size(self) -> int:
        """Number of noises that ``denoise`` takes: observations times repeats."""
        return self.observations * self.repeats

    def rows(self, name: str) -> Any:
        """The entry ``name``, a tensor or a list: a row per noise; a view where there is one observation."""
        if name in self.lists:
            return [value for value in self.lists[name] for _ in range(self.repeats)]
        return repeat_rows(self.tensors[name], self.repeats)

    def __getitem__(self, index: Any) -> Conditioning:
        """Select rows of the batch; an integer keeps the batch dimension.

        Consecutive rows of whole observations, or all of one observation, come as views.

        Args:
            index: integer, slice, list, or tensor or array of integers or of booleans.

        Raises:
            IndexError: out of range.
        """
        rows = torch.arange(self.batch_size)
        if isinstance(index, Tensor):
            index = index.cpu()
        picked = torch.atleast_1d(rows[index]).flatten()
        if not len(picked):
            return self._take(slice(0, 0))
        first, last = int(picked[0]) // self.repeats, int(picked[-1]) // self.repeats
        consecutive = torch.equal(picked, rows[int(picked[0]) : int(picked[0]) + len(picked)])
        count = last - first + 1  # of observations
        if consecutive and (count == 1 or len(picked) == count * self.repeats):
            return replace(self._take(slice(first, last + 1)), repeats=len(picked) // count)
        return self._take(picked // self.repeats)

    def _take(self, chosen: Tensor | slice) -> Conditioning:
        """Observations, each used once."""

        def part(value: Any) -> Any:
            if isinstance(chosen, slice):
                return value[chosen]
            if isinstance(value, list):
                return [value[index] for index in chosen.tolist()]
            return value[chosen.to(value.device)]

        tensors = {name: part(value) for name, value in self.tensors.items()}
        lists = {name: part(value) for name, value in self.lists.items()}
        return Conditioning(
            tensors, lists, observed=self.observed if self.observed is None else part(self.observed)
        )

    def repeat_interleave(self, k: int) -> Conditioning:
        """Use each row for ``k`` noises, one after another."""
        return replace(self, repeats=self.repeats * k)


def repeat_rows(tensor: Tensor, k: int) -> Tensor:
    """``tensor.repeat_interleave(k, 0)``, as a view where there is one row."""
    if k == 1:
        return tensor
    if len(tensor) == 1:
        return tensor.expand(k, *tensor.shape[1:])
    return tensor.repeat_interleave(k, 0)
