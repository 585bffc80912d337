"""Adam with little around its fused step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version


class FusedAdam(torch.optim.Adam):
    """``torch.optim.Adam(fused=True)``, its state included, without what each step gathers and groups anew.

    For a small network that takes longer than the step itself.
    """

    def __init__(self, parameters: Any, lr: float | Tensor) -> None:
        super().__init__(parameters, lr=lr, fused=True)
        self._gathered: list[tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]] | None = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._gathered = None
        super().load_state_dict(state_dict)

    def zero_grad(self, set_to_none: bool = True) -> None:
        if not set_to_none:
            return super().zero_grad(set_to_none=False)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One step; by the parent's where there is no state yet, or not a gradient for every parameter."""
        found = self._step(closure)
        # The fused kernel doesn't, and the bfloat16 copies of ``policies/passes.py`` are made by versions.
        for group in self.param_groups:
            increment_version(group["params"])
        return found

    def _step(self, closure: Callable[[], float] | None) -> Any:
        gradients = [[parameter.grad for parameter in group["params"]] for group in self.param_groups]
        ready = all(gradient is not None for group in gradients for gradient in group)
        if closure is not None or not ready or not self.state:
            self._gathered = None
            return _step_of_parent(self, closure)
        if self._gathered is None:
            self._gathered = [self._gather(group) for group in self.param_groups]
        for group, grads, gathered in zip(self.param_groups, gradients, self._gathered, strict=True):
            count, steps, averages, squares = gathered
            count.add_(1.0)
            broken = getattr(self, "found_inf", None)  # 1 leaves the step out, see ``distributed.StepGuard``
            torch._fused_adam_(
                group["params"],
                grads,
                averages,
                squares,
                [],
                steps,
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
                found_inf=broken,
            )
            if broken is not None:
                count.sub_(broken)
        return None

    def _gather(self, group: dict[str, Any]) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
        """The counts of steps, as one tensor of which each parameter's state has its own entry, and lists."""
        states = [self.state[parameter] for parameter in group["params"]]
        count = torch.stack([state["step"] for state in states])
        steps = list(count.unbind())
        for state, step in zip(states, steps, strict=True):
            state["step"] = step
        return count, steps, [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states]


def _step_of_parent(optimizer: FusedAdam, closure: Callable[[], float] | None) -> Any:
    """``Adam.step`` without hooks: torch has run them before ours, and would again once any Adam was made."""
    step = torch.optim.Adam.step
    return (step.__wrapped__ if getattr(step, "hooked", False) else step)(optimizer, closure)
