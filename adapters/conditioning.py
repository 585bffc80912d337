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
    """

    tensors: dict[str, Tensor]  # by name, each (N, ...) for N observations
    lists: dict[str, list[Any]] = field(default_factory=dict)  # by name, each N values (strings, for most)
    repeats: int = 1  # noises per observation; row i of the batch belongs to observation i // repeats
    observed: Tensor | None = None  # (N, d) what a noise actor is to see, where an observer says so

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
        """Rows of the batch, each with an observation of its own; an integer keeps the batch dimension."""
        rows = torch.arange(self.batch_size)[index.cpu() if isinstance(index, Tensor) else index]
        chosen = torch.atleast_1d(rows).flatten() // self.repeats

        def part(tensor: Tensor) -> Tensor:
            return tensor[chosen.to(tensor.device)]

        return Conditioning(
            {name: part(tensor) for name, tensor in self.tensors.items()},
            {name: [values[i] for i in chosen.tolist()] for name, values in self.lists.items()},
            observed=None if self.observed is None else part(self.observed),
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
