"""``residual``: the policy's own noise plus a bounded shift that the actor chooses."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.adapters import NoiseSpec, UserError
from trimtab.policies.noise_space.base import NoiseSpace, NoiseSpaceConfig, full_or_repeat, rows_and_columns


@NoiseSpaceConfig.register_subclass("residual")
@dataclass
class ResidualNoiseConfig(NoiseSpaceConfig):
    """``eps + delta(s)``: a whole draw from the prior, fresh for every chunk, moved by a bounded delta.

    The gentlest space: the noise keeps the prior's spread whatever the actor learns, so it stays near what
    the policy was trained on, and no single noise can be enforced. ``u`` is delta: neither the actor nor a
    critic of ``u`` sees eps.
    """

    # Of delta, in standard deviations of the prior.
    bound: float = 1.0
    # ``repeat``, one vector over the steps of the chunk, or ``full``.
    delta: str = "repeat"
    # Deviation of delta before training; its mean is 0. The noise then has variance 1 + start^2, and with
    # ``repeat`` its steps correlate by start^2 / (1 + start^2).
    start: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        full_or_repeat("--noise.delta", self.delta)
        if not 0.0 < self.start <= self.bound:
            raise UserError("--noise.start", f"must be above 0 and at most the bound, got {self.start}")

    def build_unscaled(self, spec: NoiseSpec) -> ResidualNoiseSpace:
        repeat = self.delta == "repeat"
        dim = rows_and_columns(spec, "--noise.delta", "repeat")[1] if repeat else spec.size
        return ResidualNoiseSpace(spec, dim, self.bound, repeat, self.start)


class ResidualNoiseSpace(NoiseSpace):
    """``u`` is delta."""

    determines_noise = False

    def __init__(self, spec: NoiseSpec, dim: int, bound: float, repeat: bool, start: float) -> None:
        super().__init__(spec, dim, bound)
        self.repeat = repeat
        self.initial_std = start

    def _noise(self, u: Tensor, prior: Tensor) -> Tensor:
        return self.unsteered(prior) + (u.unsqueeze(1) if self.repeat else u.unflatten(1, self.spec.shape))

    def _steered(self, noise: Tensor, prior: Tensor | None) -> Tensor:
        """Exact for noise from ``expand``; for other noise the delta that comes nearest, less the clip."""
        if prior is None:
            raise ValueError("what residual noise adds to the prior can be told with the prior only")
        delta = noise.float() - self.unsteered(prior).float()
        return delta.mean(1) if self.repeat else delta.flatten(1)

    def draw(self, prior: Tensor) -> Tensor:
        """A second draw, independent of ``prior`` but decided by it: seeded by a hash of each row's bits."""
        rows = prior.detach().float().flatten(1).cpu().contiguous().numpy()
        drawn = torch.empty(len(rows), self.dim)
        generator = torch.Generator()
        for row, out in zip(rows, drawn, strict=True):
            digest = hashlib.blake2b(row.tobytes(), digest_size=8).digest()
            generator.manual_seed(int.from_bytes(digest, "little"))
            out.normal_(generator=generator)
        return drawn.to(prior.device)
