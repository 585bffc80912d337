"""The draw of a squashed Gaussian, forward and backward by hand: one node in the autograd graph."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def turn(grad: Tensor, x: Tensor, limit: float) -> Tensor:
    """What of ``grad`` leads into ``clamp(x, -limit, limit)``.

    The gradient of a clamp is zero beyond its limit, that of a tanh nearly so: what got there stays. Here a
    gradient passes whole where descending it does not lead farther out; where it does, it is turned round in
    proportion to how far out ``x`` already is ("inverting gradients", Hausknecht and Stone, arXiv
    1511.04143, beyond the limit only).
    """
    far = x.abs()
    if x.device.type == "cpu" and not bool(far.amax() >= limit):  # elsewhere, to look would be to wait
        return grad
    turned = grad * (1.0 - far / limit).clamp_(-1.0, 0.0)
    return torch.where((far >= limit) & (grad * x < 0), turned, grad)


class Limited(torch.autograd.Function):
    """``clamp(x, -limit, limit)`` whose gradient leads back in (``turn``); inside, the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, limit: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.limit = limit
        return x.clamp(-limit, limit)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return turn(grad, x, ctx.limit), None


@dataclass(frozen=True)
class Squashed:
    """``bound * tanh(z / bound)`` of ``z`` ~ N(mean, exp(log_std)).

    Attributes:
        bound: of the noise space.
        limit: of the mean, or ``None``.
        low, high: range of log_std.
        curve: (offset, slope) of ``log_std = low + (high - low) / 2 * (tanh(raw / slope + offset) + 1)``;
            ``None``: ``log_std = clamp(raw, low, high)``.
    """

    bound: float
    limit: float | None
    low: float
    high: float
    curve: tuple[float, float] | None

    def draw(self, raw: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``u``, its log density, mean and log_std before squashing, as ``_draw`` makes them."""
        if torch.is_grad_enabled() and raw.requires_grad:
            return _Draw.apply(self, raw, eps)
        return _draw(self, raw, eps)[0]


def _draw(settings: Squashed, raw: Tensor, eps: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """(u, log_prob, mean, log_std), and what the backward needs beside.

    Args:
        settings: of the distribution.
        raw: (B, 2 * dim) mean before its limit, and log_std before its range.
        eps: (B, dim) standard normal.
    """
    mean, spread = raw.chunk(2, 1)
    if settings.limit is not None:
        mean = mean.clamp(-settings.limit, settings.limit)
    if settings.curve is None:
        log_std = spread.clamp(settings.low, settings.high)
        curve = log_std == spread
    else:
        offset, slope = settings.curve
        curve = (spread / slope).add_(offset).tanh_()
        half = 0.5 * (settings.high - settings.low)
        log_std = (curve * half).add_(settings.low + half)
    noise = log_std.exp().mul_(eps)
    x = (mean + noise).div_(settings.bound)
    squashed = torch.tanh(x)
    # log(1 - tanh(x)^2) = 2 (log 2 - x - softplus(-2 x)), without cancellation
    slope = torch.nn.functional.softplus(x * -2.0).add_(x).mul_(2.0)
    density = slope.sub_(log_std).sub_(eps.square(), alpha=0.5).sum(1)
    constant = eps.shape[1] * (2.0 * math.log(2.0) + 0.5 * math.log(2.0 * math.pi))
    return (squashed * settings.bound, density - constant, mean, log_std), (curve, noise, squashed)


class _Draw(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, settings: Squashed, raw: Tensor, eps: Tensor) -> tuple[Tensor, ...]:
        outputs, kept = _draw(settings, raw, eps)
        ctx.settings = settings
        ctx.save_for_backward(raw, *kept)
        ctx.set_materialize_grads(False)
        return outputs if settings.limit is not None else (*outputs[:2], outputs[2].clone(), outputs[3])

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        u_grad: Tensor | None,
        density_grad: Tensor | None,
        mean_grad: Tensor | None,
        log_std_grad: Tensor | None,
    ) -> tuple[None, Tensor, None]:
        settings = ctx.settings
        raw, curve, noise, squashed = ctx.saved_tensors
        z = torch.zeros_like(squashed)
        if u_grad is not None:
            z = torch.addcmul(u_grad, u_grad * squashed, squashed, value=-1.0)  # 1 - tanh^2
        if density_grad is not None:
            density_grad = density_grad.unsqueeze(1)
            z.addcmul_(density_grad, squashed, value=2.0 / settings.bound)
        spread = z * noise
        if density_grad is not None:
            spread.sub_(density_grad)
        if log_std_grad is not None:
            spread.add_(log_std_grad)
        if mean_grad is not None:
            z.add_(mean_grad)
        if settings.limit is not None:
            z = turn(z, raw[:, : z.shape[1]], settings.limit)
        if settings.curve is None:
            spread = spread * curve
        else:
            scale = 0.5 * (settings.high - settings.low) / settings.curve[1]
            spread = torch.addcmul(spread, spread * curve, curve, value=-1.0).mul_(scale)
        return None, torch.cat([z, spread], 1), None
