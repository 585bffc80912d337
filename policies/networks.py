"""Multilayer perceptrons, singly and as ensembles evaluated by one batched matmul per layer."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn

from trimtab.adapters.errors import UserError
from trimtab.policies import passes

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh}


def require_activation(option: str, name: str) -> None:
    """Raise a UserError unless ``name`` is a known activation."""
    if name not in ACTIVATIONS:
        raise UserError(option, f"'{name}' is none of {', '.join(ACTIVATIONS)}")


class EnsembleMLP(nn.Module):
    """``members`` independent networks with LayerNorm, as one batched matmul per layer.

    Args:
        members: ensemble size E.
        in_dim, out_dim: sizes per member.
        hidden: width of the hidden layers.
        layers: number of hidden layers.
        layer_norm: normalise before each activation (no learnt affine part).
        activation: ``relu`` or ``tanh``.
    """

    def __init__(
        self,
        members: int,
        in_dim: int,
        out_dim: int,
        hidden: int,
        layers: int,
        layer_norm: bool = True,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        self.passed = passes.Layers(False, layer_norm, activation)
        sizes = [in_dim] + [hidden] * layers + [out_dim]
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        for fan_in, fan_out in itertools.pairwise(sizes):
            scale = 1.0 / math.sqrt(fan_in)  # the default of nn.Linear
            self.weights.append(nn.Parameter(torch.empty(members, fan_in, fan_out).uniform_(-scale, scale)))
            self.biases.append(nn.Parameter(torch.empty(members, 1, fan_out).uniform_(-scale, scale)))

    def forward(self, x: Tensor, own: Tensor | None = None, members: Tensor | None = None) -> Tensor:
        """(B, in_dim) or (E, B, in_dim) -> (E, B, out_dim).

        With ``own`` the input is ``x`` (B, d) beside ``own`` (B, in_dim - d); or beside each of ``own``
        (B, m, in_dim - d), and the output (E, B * m, out_dim). With ``members`` (n,), where no gradient is
        recorded, only those are asked: (n, ..., out_dim).
        """
        # Straight from the dictionaries: what ParameterList does around them takes as long as a small matmul.
        pairs = zip(self.weights._parameters.values(), self.biases._parameters.values(), strict=True)
        return passes.run(self.passed, x, own, [p for pair in pairs for p in pair], members)


class MLP(nn.Sequential):
    """A plain network: ``nn.Linear`` layers, ``LayerNorm`` without an affine part, activations.

    Args:
        passed: says which, for the pass that is made by hand (``passes.py``).
        modules: the layers.
    """

    def __init__(self, passed: passes.Layers, *modules: nn.Module) -> None:
        super().__init__(*modules)
        self.passed = passed

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_dim) -> (B, out_dim)."""
        if not torch.is_grad_enabled() and passes.in_own_dtype():  # who acts: the layers themselves take less
            return super().forward(x)
        linear = (module for module in self if isinstance(module, nn.Linear))
        return passes.run(self.passed, x, None, [p for m in linear for p in (m.weight, m.bias)]).squeeze(0)


def mlp(
    in_dim: int, out_dim: int, hidden: int, layers: int, activation: str = "relu", layer_norm: bool = False
) -> MLP:
    """A plain network with ``layers`` hidden layers; ``layer_norm`` as in ``EnsembleMLP``."""
    modules: list[nn.Module] = []
    for index in range(layers):
        modules.append(nn.Linear(in_dim if index == 0 else hidden, hidden))
        if layer_norm:
            modules.append(nn.LayerNorm(hidden, elementwise_affine=False))
        modules.append(ACTIVATIONS[activation]())
    modules.append(nn.Linear(hidden, out_dim))
    return MLP(passes.Layers(True, layer_norm, activation), *modules)


class FeatureNormalizer(nn.Module):
    """Standardises observation features with fixed statistics; the identity until they are set.

    Entries that did not vary are centred but not scaled up, and everything is clipped to +-10, so that a
    coordinate that stood still while the statistics were taken cannot dominate later.
    """

    clip = 10.0
    min_std = 1e-2

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))

    @torch.no_grad()
    def fit(self, features: Tensor) -> None:
        """Take mean and deviation of the first entries from ``features`` (N, up to dim).

        What follows them (an encoder's output, which learns) stays as it is.
        """
        count = features.shape[1]
        if count == 0:
            return
        self.mean[:count] = features.mean(0)
        self.std[:count] = features.std(0).clamp_min(self.min_std)

    def forward(self, features: Tensor) -> Tensor:
        return (features - self.mean).div_(self.std).clamp_(-self.clip, self.clip)


class NoFeatures(FeatureNormalizer):
    """Hands nothing on: for a network that does not look at the observation."""

    def __init__(self) -> None:
        super().__init__(0)

    def fit(self, features: Tensor) -> None:
        """Nothing to take."""

    def forward(self, features: Tensor) -> Tensor:
        return features[:, :0]


class Offset(nn.Module):
    """One vector, whatever comes in: (B, n) -> (B, dim)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.bias.expand(x.shape[0], -1)
