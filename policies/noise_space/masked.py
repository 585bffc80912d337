"""``masked``: some entries of the noise are steered, the rest stays the policy's own."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.adapters import NoiseSpec, UserError
from trimtab.policies.noise_space.base import NoiseSpace, NoiseSpaceConfig, rows_and_columns

RANGE = re.compile(r"(\d*):(\d*)")


@NoiseSpaceConfig.register_subclass("masked")
@dataclass
class MaskedNoiseConfig(NoiseSpaceConfig):
    """Only the entries that can change the executed actions, or those of the given rows and columns.

    The others are drawn afresh from the prior for every chunk.
    """

    # Steps to steer, such as ``0:8`` (0 to 7), ``:8`` or ``0:2,6:8``; default: all.
    rows: str | None = None
    # Dimensions to steer, likewise.
    columns: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rows", "columns"):
            _ranges(f"--noise.{name}", getattr(self, name))

    def build_unscaled(self, spec: NoiseSpec) -> MaskedNoiseSpace:
        steered = torch.ones(spec.shape, dtype=torch.bool) if spec.live is None else spec.live.cpu().clone()
        for axis, name in enumerate(("rows", "columns")):
            text = getattr(self, name)
            if text is None:
                continue
            option = f"--noise.{name}"
            length = rows_and_columns(spec, option, name)[axis]
            named = torch.zeros(length, dtype=torch.bool)
            for start, stop in _ranges(option, text):
                if (stop or length) > length or start >= length:
                    raise UserError(option, f"this policy's noise has {length} {name}, got {text}")
                named[start:stop] = True
            steered &= named.unsqueeze(1 - axis)
        if not steered.any():
            option = "--noise.columns" if self.columns else "--noise.rows"
            raise UserError(option, "none of these entries can change what this policy does")
        return MaskedNoiseSpace(spec, steered, self.bound)


def _ranges(option: str, text: str | None) -> list[tuple[int, int | None]]:
    """``0:2,6:`` -> [(0, 2), (6, None)]."""
    found = []
    for part in [] if text is None else str(text).split(","):
        match = RANGE.fullmatch(part.strip())
        if match is None:
            # YAML, which reads options too, takes 1:8 for 68 (base 60).
            hint = "; write 01:8 for 1:8, which YAML takes for a number" if part.strip().isdigit() else ""
            raise UserError(option, f"'{text}' is no range such as 0:8 or 0:2,6:8{hint}")
        start, stop = int(match[1] or 0), int(match[2]) if match[2] else None
        if stop is not None and stop <= start:
            raise UserError(option, f"{part.strip()} is empty; a range runs up to, not including, its end")
        found.append((start, stop))
    return found


class MaskedNoiseSpace(NoiseSpace):
    """``u`` holds the steered entries, in the order of the flattened noise.

    Args:
        spec: the policy's noise.
        steered: boolean mask of ``spec.shape``.
        bound: see ``NoiseSpace``.
    """

    determines_noise = False

    def __init__(self, spec: NoiseSpec, steered: Tensor, bound: float) -> None:
        self.steered = steered
        self._index = steered.flatten().nonzero().squeeze(1)
        super().__init__(spec, len(self._index), bound)

    def _noise(self, u: Tensor, prior: Tensor) -> Tensor:
        rest = self.unsteered(prior).flatten(1)
        return rest.index_copy(1, self._index.to(u.device), u.to(rest.dtype)).unflatten(1, self.spec.shape)

    def _steered(self, noise: Tensor, prior: Tensor | None) -> Tensor:
        return self.draw(noise)

    def draw(self, prior: Tensor) -> Tensor:
        return prior.flatten(1)[:, self._index.to(prior.device)]
