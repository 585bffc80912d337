"""What several processes of one run do together: average, count, agree. One process does it alone, for free.

All processes of a run step their environments chunk by chunk in step with each other, and every collective
call is made by all of them, whatever their own environments have brought: a process without a finished
episode, or with slow environments, sends zeros and is waited for.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class ProcessGroup:
    """The processes of an ``accelerate.Accelerator``.

    Attributes:
        rank, size: of this process, and how many there are.
        main: whether this process writes.
        waited: seconds spent on adding up, waiting for the others included.
    """

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator
        self.rank, self.size = accelerator.process_index, accelerator.num_processes
        self.main = self.rank == 0
        self.waited = 0.0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sum over the processes, entry by entry."""
        if self.size == 1:
            return list(values)
        # NCCL takes tensors on its device only; MPS has no float64, but no processes either.
        total = torch.tensor(list(values), dtype=torch.float64, device=self.accelerator.device)
        self._add_up(total)
        return total.tolist()

    def _add_up(self, flat: Tensor) -> None:
        """Replace ``flat`` by its sum over the processes."""
        started = time.perf_counter()
        torch.distributed.all_reduce(flat)
        self.waited += time.perf_counter() - started

    def all(self, here: bool) -> bool:
        """Whether ``here`` holds on every process; also a barrier."""
        return self.sum([0.0 if here else 1.0])[0] == 0.0

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its mean over the processes; all are sent as one."""
        if self.size == 1:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        self._add_up(flat)
        parts = (flat / self.size).split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(list(tensors), [p.view_as(t) for p, t in zip(parts, tensors, strict=True)])

    def rows(self, rows: Tensor) -> Tensor:
        """The rows (n, ...) of all processes, in their order; n may differ."""
        if self.size == 1:
            return rows
        counts = [int(n) for n in self.sum([len(rows) if r == self.rank else 0.0 for r in range(self.size)])]
        padded = torch.zeros(max(counts), *rows.shape[1:], dtype=rows.dtype, device=self.accelerator.device)
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        torch.distributed.all_gather(parts, padded)
        found = torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
        return found.to(rows.device)

    def share(self, module: nn.Module) -> None:
        """Give every process the weights and buffers of the first."""
        if self.size > 1:
            for value in module.state_dict().values():
                torch.distributed.broadcast(value, 0)

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in their order."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(found, value)
        return found


class StepGuard:
    """Runs before every step of an optimiser: averages the gradients, clips them, leaves out broken steps.

    A step whose gradients hold NaN or Inf is left out on every process (they see the same average): weights
    and the optimiser's state stay as they are. Adam's fused step does so on the device, without a wait.

    Args:
        world: the processes.
        clip: largest norm of an optimiser's gradients; ``None`` leaves them as they are.

    Attributes:
        skipped: steps left out, a scalar on the learner's device.
    """

    def __init__(self, world: ProcessGroup, clip: float | None = None) -> None:
        self.world, self.clip = world, clip
        self.skipped = torch.zeros((), device=world.accelerator.device)

    def attach(self, algorithm: nn.Module) -> None:
        """Guard all optimisers of an algorithm."""
        for optimizer in optimizers(algorithm).values():
            optimizer.register_step_pre_hook(self)

    @torch.no_grad()
    def __call__(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        parameters = (p for group in optimizer.param_groups for p in group["params"])
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        self.world.average(gradients)
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        broken = (~torch.isfinite(norm)).float()
        self.skipped += broken
        if self.clip is not None:
            torch._foreach_mul_(gradients, (self.clip / norm.clamp_min(1e-12)).clamp_max(1.0))
        optimizer.found_inf = broken  # type: ignore[attr-defined]


def optimizers(algorithm: nn.Module) -> dict[str, torch.optim.Optimizer]:
    """The optimisers among an algorithm's attributes, by name."""
    return {k: v for k, v in vars(algorithm).items() if isinstance(v, torch.optim.Optimizer)}


def count_outcomes(outcomes: list[tuple[int, bool, bool]], tasks: list[str]) -> list[float]:
    """How many episodes ended so, by task, steered or not, success or not: what processes can add up."""
    counts = [0.0] * (4 * len(tasks))
    for task, steered, success in outcomes:
        counts[4 * task + 2 * steered + success] += 1.0
    return counts


def list_outcomes(counts: list[float]) -> list[tuple[int, bool, bool]]:
    """The inverse of ``count_outcomes``, in an order of its own."""
    found = []
    for index, count in enumerate(counts):
        found += [(index // 4, bool(index // 2 % 2), bool(index % 2))] * int(count)
    return found


def weights_digest(module: nn.Module) -> str:
    """A hash of a module's weights and buffers."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
