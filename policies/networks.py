"""Multilayer perceptrons, singly and as ensembles evaluated by one batched matmul per layer.

Under ``torch.autocast`` (``--rl.precision=bfloat16``) hidden layers are multiplied in bfloat16. The last
layer stays in float32: a value of -90 would be rounded to a multiple of 0.5.
"""

import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import layer_norm

from trimtab.adapters.errors import UserError

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh}


def require_activation(option: str, name: str) -> None:
    """Raise a UserError unless ``name`` is a known activation."""
    if name not in ACTIVATIONS:
        raise UserError(option, f"'{name}' is none of {', '.join(ACTIVATIONS)}")


class EnsembleMLP(nn.Module):
    """``members`` (E) independent networks of a state and an action, with one output each.

    ``in_dim`` is the length of both together; ``layer_norm`` normalises before each activation (no learnt
    affine part).
    """

    def __init__(
        self, members: int, in_dim: int, hidden: int, layers: int, layer_norm: bool, activation: str
    ) -> None:
        super().__init__()
        self.layer_norm = layer_norm
        self.activate = torch.relu_ if activation == "relu" else torch.tanh_
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for fan_in, fan_out in itertools.pairwise([in_dim] + [hidden] * layers + [1]):
            scale = 1.0 / math.sqrt(fan_in)  # the default of nn.Linear
            self.weights.append(nn.Parameter(torch.empty(members, fan_in, fan_out).uniform_(-scale, scale)))
            self.biases.append(nn.Parameter(torch.empty(members, 1, fan_out).uniform_(-scale, scale)))

    def forward(self, x: Tensor, u: Tensor, members: Tensor | None = None, dropout: float = 0.0) -> Tensor:
        """States (B, d) and actions (B, a) -> (E, B); with m actions to a state, (B, m, a) -> (E, B, m).

        With ``members`` (n,), only those are asked: (n, ...). Of each hidden layer a share ``dropout`` of the
        units is dropped, drawn anew for each input and member.
        """
        weights, biases = list(self.weights), list(self.biases)
        if members is not None:
            weights, biases = ([part[members] for part in parts] for parts in (weights, biases))
        count, width = len(weights[0]), x.shape[1]
        actions = u.flatten(0, -2)
        if len(actions) == len(x):
            h = torch.baddbmm(biases[0], torch.cat([x, actions], 1).expand(count, -1, -1), weights[0])
        else:  # the state's share of the first layer is computed once for all of its actions
            h = torch.bmm(actions.expand(count, -1, -1), weights[0][:, width:])
            shared = torch.baddbmm(biases[0], x.expand(count, -1, -1), weights[0][:, :width])
            h = (h.unflatten(1, (len(x), -1)) + shared.unsqueeze(2)).flatten(1, 2)
        for weight, bias in zip(weights[1:-1], biases[1:-1], strict=True):
            h = torch.baddbmm(bias, self._activate(h, dropout), weight)
        h = self._activate(h, dropout)
        with torch.autocast(h.device.type, enabled=False):
            return torch.baddbmm(biases[-1], h.to(weights[-1].dtype), weights[-1]).view(-1, *u.shape[:-1])

    def _activate(self, h: Tensor, share: float) -> Tensor:
        h = self.activate(layer_norm(h, h.shape[-1:]) if self.layer_norm else h)
        return functional.dropout(h, share) if share else h


class Head(nn.Linear):
    """A last layer: in its own precision under ``torch.autocast``, too."""

    def reset_parameters(self) -> None:
        """As any other layer; of no inputs, zero."""
        if self.in_features:
            super().reset_parameters()
        else:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.weight.dtype))


def mlp(
    in_dim: int, out_dim: int, hidden: int, layers: int, activation: str = "relu", layer_norm: bool = False
) -> nn.Sequential:
    """A plain network with ``layers`` hidden layers; ``layer_norm`` as in ``EnsembleMLP``.

    Of no inputs it makes one vector that is learnt: a last layer's bias.
    """
    if in_dim == 0:
        return nn.Sequential(Head(0, out_dim))
    modules: list[nn.Module] = []
    for index in range(layers):
        modules.append(nn.Linear(in_dim if index == 0 else hidden, hidden))
        if layer_norm:
            modules.append(nn.LayerNorm(hidden, elementwise_affine=False))
        modules.append(ACTIVATIONS[activation]())
    return nn.Sequential(*modules, Head(hidden, out_dim))


class ClampInvertingGradients(torch.autograd.Function):
    """``clamp(x, -limit, limit)`` whose gradient leads back in; inside, the identity.

    The gradient of a clamp is zero beyond its limit, that of a tanh nearly so: what got there stays. Here a
    gradient passes whole where descending it does not lead farther out; where it does, it is turned round in
    proportion to how far out ``x`` already is ("inverting gradients", Hausknecht and Stone, arXiv
    1511.04143, beyond the limit only).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, limit: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.limit = limit
        return x.clamp(-limit, limit)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        far = x.abs()
        turned = grad * (1.0 - far / ctx.limit).clamp(-1.0, 0.0)
        return torch.where((far >= ctx.limit) & (grad * x < 0), turned, grad), None


class FeatureNormalizer(nn.Module):
    """Standardises observation features with fixed statistics; the identity until they are set.

    Entries that did not vary are centred but not scaled up, and everything is clipped to +-10, so that a
    coordinate that stood still while the statistics were taken cannot dominate later.
    """

    clip = 10.0
    min_std = 1e-2
    mean: Tensor
    std: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))

    @torch.no_grad()
    def fit(self, features: Tensor) -> None:
        """Take mean and deviation of the first entries from ``features`` (N, up to dim).

        What follows them (an encoder's output, which learns) stays as it is.
        """
        count = min(features.shape[1], len(self.mean))
        self.mean[:count] = features.mean(0)[:count]
        self.std[:count] = features.std(0)[:count].clamp_min(self.min_std)

    def forward(self, features: Tensor) -> Tensor:
        """(B, dim) of each; of (B, n) where ``dim`` is 0: (B, 0)."""
        return (features - self.mean).div_(self.std).clamp_(-self.clip, self.clip)
