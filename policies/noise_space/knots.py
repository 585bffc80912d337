"""``knots``: a few vectors over the chunk, interpolated over time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.adapters import NoiseSpec, UserError
from trimtab.adapters.errors import at_least
from trimtab.policies.noise_space.base import NoiseSpace, NoiseSpaceConfig, rows_and_columns


@NoiseSpaceConfig.register_subclass("knots")
@dataclass
class KnotNoiseConfig(NoiseSpaceConfig):
    """``knots`` vectors, the first at the chunk's first step, the last at its last, interpolated between.

    1 is ``repeat``, as many as the noise has steps is ``full``. As with ``repeat``, steps are correlated,
    which the policy never met: compare its success.
    """

    # How many.
    knots: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, self, "--noise.", "knots")

    def build_unscaled(self, spec: NoiseSpec) -> KnotNoiseSpace:
        steps, dim = rows_and_columns(spec, "--noise.type", "knots")
        if self.knots > steps:
            raise UserError("--noise.knots", f"this policy's noise has {steps} steps, got {self.knots} knots")
        return KnotNoiseSpace(spec, self.knots * dim, self.bound, knot_weights(self.knots, steps))


def knot_weights(knots: int, steps: int) -> Tensor:
    """(steps, knots) weights of linear interpolation, each row of length 1 in the L2 norm.

    Plain interpolation halves the variance between two independent knots; so scaled it is 1 at every step,
    and steps correlate as ``weights @ weights.T``.
    """
    position = torch.linspace(0.0, knots - 1.0, steps, dtype=torch.float64)
    weights = (1.0 - (position[:, None] - torch.arange(knots)).abs()).clamp_min(0.0)
    return weights / weights.norm(dim=1, keepdim=True)


class KnotNoiseSpace(NoiseSpace):
    """``u`` is (knots, dim), flattened.

    The bound holds for ``u``; between two knots that agree, the noise reaches sqrt(2) times as far.
    """

    def __init__(self, spec: NoiseSpec, dim: int, bound: float, weights: Tensor) -> None:
        super().__init__(spec, dim, bound)
        self.weights = weights.float()
        self.inverse = torch.linalg.pinv(weights).float()

    def expand(self, u: Tensor, prior: Tensor) -> Tensor:
        knots = u.unflatten(1, (-1, self.spec.shape[1]))
        return (self.weights.to(u) @ knots).to(self.spec.dtype)

    def project(self, noise: Tensor, prior: Tensor | None = None) -> Tensor:
        """For noise from elsewhere: the knots that come nearest to it (least squares)."""
        knots = self.inverse.to(noise.device) @ noise.to(self.inverse.dtype)
        return knots.flatten(1).clamp(-self.bound, self.bound)
