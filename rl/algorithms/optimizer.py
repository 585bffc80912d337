"""Adam with little around its fused step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class FusedAdam(torch.optim.Adam):
    """``torch.optim.Adam(fused=True)``, its state included, without what each step gathers and groups anew.

    For a small network that takes longer than the step itself.
    """

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, lr=lr, fused=True)

    def zero_grad(self, set_to_none: bool = True) -> None:
        if not set_to_none:
            return super().zero_grad(set_to_none=False)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One step; by the parent's where there is no state yet, or not a gradient for every parameter."""
        gradients = [[parameter.grad for parameter in group["params"]] for group in self.param_groups]
        ready = all(gradient is not None for group in gradients for gradient in group)
        if closure is not None or not ready or not self.state:
            return super().step(closure)
        for group, grads in zip(self.param_groups, gradients, strict=True):
            states = [self.state[parameter] for parameter in group["params"]]
            steps = [state["step"] for state in states]
            torch._foreach_add_(steps, 1.0)
            torch._fused_adam_(
                group["params"],
                grads,
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                steps,
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )
