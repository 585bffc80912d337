"""Multilayer perceptrons forward and backward, by hand: one node in the autograd graph, few operations.

On a CPU, what a small network costs beyond its matmuls is what PyTorch does around them. Here activations and
their gradients are taken in place, the gradient of the input is only made where it is asked for, and
features that many actions share are multiplied once per state. The results are those of the plain layers.

Within ``matmuls_in(torch.bfloat16)`` the hidden layers are multiplied in bfloat16 (sums in float32), with
copies of the weights that are made once after each change of them. The last layer stays in float32, since a
value of -90 would be rounded to a multiple of 0.5; so do the weights that the optimiser changes, and all
losses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

EPS = 1e-5  # the default of nn.LayerNorm
_aten = torch.ops.aten
_dtype: torch.dtype | None = None  # of the matmuls; None: as the weights
_compiled: Any = None  # a ``compiling.CompiledPasses``, within ``passes_by``


@contextmanager
def matmuls_in(dtype: torch.dtype | None) -> Iterator[None]:
    """Within, the hidden layers are multiplied in ``dtype``; ``None``: in that of their weights."""
    global _dtype
    before, _dtype = _dtype, dtype
    try:
        yield
    finally:
        _dtype = before


@contextmanager
def passes_by(compiled: Any) -> Iterator[None]:
    """Within, passes are made by a ``compiling.CompiledPasses``; ``None``: by this module's functions."""
    global _compiled
    before, _compiled = _compiled, compiled
    try:
        yield
    finally:
        _compiled = before


def in_own_dtype() -> bool:
    """Whether hidden layers are multiplied in the dtype of their weights."""
    return _dtype is None


@dataclass
class Layers:
    """What a pass has to know of its network beside the parameters.

    Attributes:
        linear: weights are those of ``nn.Linear``, (out, in); else an ensemble's, (E, in, out).
        layer_norm: before each activation, without an affine part.
        activation: ``relu`` or ``tanh``.
    """

    linear: bool
    layer_norm: bool
    activation: str
    _copies: list[Tensor] = field(default_factory=list, repr=False)
    _made_of: tuple = ()

    def __deepcopy__(self, memo: Any) -> Layers:
        return Layers(self.linear, self.layer_norm, self.activation)

    def operands(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """The parameters as the pass multiplies them: w (E, in, out), b (E, 1, out), w, b, ..."""
        hidden = parameters[:-2]
        if _dtype is not None and _dtype != hidden[0].dtype:
            hidden = self._cast(hidden)
        found = [*hidden, *parameters[-2:]]
        if self.linear:
            return [p.t().unsqueeze(0) if p.dim() == 2 else p.view(1, 1, -1) for p in found]
        return found

    def _cast(self, hidden: Sequence[Tensor]) -> list[Tensor]:
        """Copies in the dtype of the matmuls, made anew when a parameter has changed."""
        made_of = (_dtype, *((p._version, p.data_ptr()) for p in hidden))
        if made_of != self._made_of:
            with torch.no_grad():
                if self._copies and self._made_of[0] == _dtype and self._copies[0].device == hidden[0].device:
                    torch._foreach_copy_(self._copies, list(hidden))
                else:
                    self._copies = [p.to(_dtype) for p in hidden]
            self._made_of = made_of
        return self._copies

    def activate_(self, h: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return torch.tanh(h) if self.activation == "tanh" else torch.relu(h)
        if self.activation == "tanh":
            return h.tanh_()
        _bits(h).relu_()
        return h

    def deactivate_(self, grad: Tensor, h: Tensor) -> Tensor:
        """The gradient before an activation that gave ``h``, in the place of that after it."""
        if torch.compiler.is_compiling():
            return grad * (1 - h * h) if self.activation == "tanh" else torch.where(h > 0, grad, 0.0)
        if self.activation == "tanh":
            return _aten.tanh_backward.grad_input(grad, h, grad_input=grad)
        bits = _bits(grad)
        _aten.threshold_backward.grad_input(bits, _bits(h), 0, grad_input=bits)
        return grad


def _bits(x: Tensor) -> Tensor:
    """A bfloat16 as the integer that has its sign: zeroing negatives is several times faster on a CPU."""
    return x.view(torch.int16) if x.dtype == torch.bfloat16 and x.device.type == "cpu" else x


def forget_copies(module: nn.Module) -> None:
    """Let the networks in ``module`` make their copies in another dtype anew."""
    for part in module.modules():
        if isinstance(layers := getattr(part, "passed", None), Layers):
            layers._copies, layers._made_of = [], ()


def run(
    layers: Layers,
    x: Tensor,
    own: Tensor | None,
    parameters: Sequence[Tensor],
    members: Tensor | None = None,
) -> Tensor:
    """Output (E, N, out), see ``forward``; with a graph where gradients are recorded.

    Raises:
        ValueError: some ``members`` alone are asked while gradients are recorded.
    """
    if torch.is_grad_enabled():
        if members is not None:
            raise ValueError("members can be chosen where no gradient is recorded")
        return _MLP.apply(layers, x, own, *parameters)
    make = forward if _compiled is None else _compiled.forward
    operands = layers.operands(parameters)
    if members is not None:
        operands = [operand.index_select(0, members) for operand in operands]
    return make(layers, operands, x, own)


def forward(
    layers: Layers, operands: Sequence[Tensor], x: Tensor, own: Tensor | None, kept: list | None = None
) -> Tensor:
    """Output (E, N, out) for the input ``x`` (N, in) or (E, N, in), or ``x`` (N, d) beside ``own``.

    ``own`` is (N, in - d), or (N / m, m, in - d) with m of them to each ``x`` (N / m, d), whose share of the
    first layer is then computed once.

    Args:
        layers, operands: the network.
        x, own: input.
        kept: what ``backward`` needs is put there.
    """
    members, dtype = operands[0].shape[0], operands[0].dtype
    several = own is not None and own.dim() == 3
    if own is not None and not several:
        x = torch.cat([x, own], 1)
    x = _over_members(x.to(dtype), members)
    if several:
        own = _over_members(own.to(dtype).flatten(0, 1), members)
    h, steps = x, []
    last = len(operands) // 2 - 1
    for index in range(last):
        weight, bias = operands[2 * index], operands[2 * index + 1]
        if index or not several:
            h = torch.baddbmm(bias, h, weight)
        else:
            width = x.shape[2]
            h = torch.bmm(own, weight[:, width:])
            shared = torch.baddbmm(bias, x, weight[:, :width])
            h.unflatten(1, (x.shape[1], -1)).add_(shared.unsqueeze(2))
        normed = None
        if layers.layer_norm:
            before, ones = h, h.new_ones(h.shape[-1])  # with an affine part it is faster on a CPU
            h, mean, rstd = torch.native_layer_norm(before, h.shape[-1:], ones, torch.zeros_like(ones), EPS)
            normed = (before, mean, rstd)
        h = layers.activate_(h)
        if kept is not None:
            steps.append((normed, h))
    h = h.to(operands[-2].dtype)
    if kept is not None:
        kept += [x, own if several else None, h, steps]
    return _last(operands[-1], h, operands[-2])


def backward(
    layers: Layers,
    operands: Sequence[Tensor],
    kept: list,
    grad: Tensor,
    width: int,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, list[Tensor]]:
    """Gradients of ``x`` (E, N, d) and ``own`` (E, N, in - d) for each member, and of the parameters.

    Args:
        layers, operands: the network.
        kept: filled by ``forward``.
        grad: (E, N, out) of the output; left as it is.
        width: d, or ``in`` where there was no ``own``.
        wanted: whether those of ``x``, ``own`` and the parameters are.
    """
    x, own, h, steps = kept
    main, dtype = operands[-2].dtype, operands[0].dtype
    found: list[Tensor] = []  # from the last to the first
    weight = operands[-2].transpose(1, 2)
    if wanted[2]:
        found += [grad.sum(1, keepdim=True), _weight_gradient(layers, h, grad)]
    grad = (grad * weight if grad.shape[2] == 1 else torch.bmm(grad, weight)).to(dtype)
    for index in reversed(range(len(steps))):
        normed, h = steps[index]
        grad = layers.deactivate_(grad, h)
        if normed is not None:
            before, mean, rstd = normed
            shape, mask = before.shape[-1:], [True, False, False]
            grad = _aten.native_layer_norm_backward(grad, before, shape, mean, rstd, None, None, mask)[0]
        if index:
            if wanted[2]:
                inputs = steps[index - 1][1]
                found += [grad.sum(1, keepdim=True), _weight_gradient(layers, inputs, grad)]
            grad = torch.bmm(grad, operands[2 * index].transpose(1, 2))
    shared = grad  # summed over what has the same x
    if own is not None and (wanted[0] or wanted[2]):
        shared = grad.unflatten(1, (x.shape[1], -1)).sum(2)
    if wanted[2]:
        first = _weight_gradient(layers, x, shared)
        if own is not None:
            parts = [first, _weight_gradient(layers, own, grad)]
            first = torch.cat(parts, 2 if layers.linear else 1)
        found += [shared.sum(1, keepdim=True), first]
    weight = operands[0].transpose(1, 2)
    x_grad = torch.bmm(shared, weight[..., :width]).to(main) if wanted[0] else None
    own_grad = torch.bmm(grad, weight[..., width:]).to(main) if wanted[1] else None
    return x_grad, own_grad, [one.to(main) for one in reversed(found)]


def _over_members(x: Tensor, members: int) -> Tensor:
    return x.unsqueeze(0).expand(members, -1, -1) if x.dim() == 2 else x


def _last(bias: Tensor, h: Tensor, weight: Tensor) -> Tensor:
    """``h @ weight + bias``. Of several networks with a single output each, a CPU's batched matmul takes
    three to six times as long as the sum of products.
    """
    if weight.shape[2] == 1 < weight.shape[0] and h.device.type == "cpu":
        return (h * weight.transpose(1, 2)).sum(2, keepdim=True).add_(bias)
    return torch.baddbmm(bias, h, weight)


def _weight_gradient(layers: Layers, inputs: Tensor, grad: Tensor) -> Tensor:
    """Of an ensemble (E, in, out), of ``nn.Linear`` (1, out, in)."""
    if layers.linear:
        return torch.bmm(grad.transpose(1, 2), inputs)
    if grad.shape[2] == 1:  # the other way round it takes a CPU ten times as long
        return torch.bmm(grad.transpose(1, 2), inputs).transpose(1, 2)
    return torch.bmm(inputs.transpose(1, 2), grad)


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layers: Layers, x: Tensor, own: Tensor | None, *parameters: Tensor) -> Tensor:
        operands, kept = layers.operands(parameters), []
        ctx.compiled = _compiled
        out = (forward if _compiled is None else _compiled.forward)(layers, operands, x, own, kept)
        # Saved for their versions too: after an optimiser step the operands would not be the same.
        ctx.save_for_backward(*parameters)
        ctx.layers, ctx.operands, ctx.kept = layers, operands, kept
        ctx.x_shape, ctx.own_shape = x.shape, None if own is None else own.shape
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        parameters, asked = ctx.saved_tensors, ctx.needs_input_grad
        wanted = asked[1], asked[2], any(asked[3:])
        width = ctx.x_shape[-1]
        make = backward if ctx.compiled is None else ctx.compiled.backward
        x_grad, own_grad, found = make(ctx.layers, ctx.operands, ctx.kept, grad, width, wanted)
        if x_grad is not None and len(ctx.x_shape) == 2:
            x_grad = x_grad.sum(0)
        if own_grad is not None:
            own_grad = own_grad.sum(0).view(ctx.own_shape)
        if not found:
            return None, x_grad, own_grad, *(None for _ in parameters)
        return None, x_grad, own_grad, *(one.view(p.shape) for one, p in zip(found, parameters, strict=True))
