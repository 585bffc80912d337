"""The hand-written passes compiled by ``torch.compile``, as long as that works."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from trimtab.adapters.errors import reason
from trimtab.policies import passes

VARIANTS = 64  # networks and shapes that one pass is compiled for; torch gives up at 8


class CompiledPasses:
    """``passes.forward`` and ``passes.backward``, compiled for each network and shape at its first call.

    What cannot be compiled here (no C++ compiler, a backend that fails) runs as it is, with one line on
    stderr: both functions leave their arguments as they are, so a call that failed can be made again.

    Args:
        option: named in that line.
    """

    def __init__(self, option: str) -> None:
        self.option, self.works = option, True
        torch._dynamo.config.recompile_limit = max(VARIANTS, torch._dynamo.config.recompile_limit)
        # Every shape comes back in each update. Draws, should there be any, are to be eager ones.
        settings: dict[str, Any] = {"dynamic": False, "options": {"fallback_random": True}}
        self._forward = torch.compile(_forward, **settings)
        self._backward = torch.compile(passes.backward, **settings)

    def forward(
        self, layers: Any, operands: Any, x: torch.Tensor, own: torch.Tensor | None, kept: list | None = None
    ) -> torch.Tensor:
        """As ``passes.forward``."""
        arguments = layers, operands, x, own, kept is not None
        out, found = self._run(self._forward, _forward, arguments)
        if kept is not None:
            kept += found
        return out

    def backward(self, *arguments: Any) -> Any:
        """As ``passes.backward``."""
        return self._run(self._backward, passes.backward, arguments)

    def _run(self, compiled: Callable[..., Any], plain: Callable[..., Any], arguments: tuple) -> Any:
        if self.works:
            try:
                return compiled(*arguments)
            except Exception as error:  # of many classes, from dynamo to the compiler's exit code
                self.works = False
                why = reason(error.__cause__ or error)
                print(f"{self.option}: cannot compile here ({why}); it runs uncompiled", file=sys.stderr)
        return plain(*arguments)


def _forward(
    layers: Any, operands: Any, x: torch.Tensor, own: torch.Tensor | None, keep: bool
) -> tuple[torch.Tensor, list]:
    kept: list = []
    out = passes.forward(layers, operands, x, own, kept if keep else None)
    return out, kept
