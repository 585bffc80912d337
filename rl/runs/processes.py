"""What several processes of one run do together: average, gather, agree. One process does it alone, for free.

All processes of a run step their environments chunk by chunk in step with each other, and every collective
call is made by all of them, whatever their own environments have brought.
"""

import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn


class ProcessGroup:
    """The processes of an ``accelerate.Accelerator``.

    Attributes:
        rank, size: of this process, and how many there are.
        main: whether this process writes.
        waited: seconds spent on gathering and averaging, waiting for the others included.
    """

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator
        self.rank, self.size = accelerator.process_index, accelerator.num_processes
        self.main = self.rank == 0
        self.waited = 0.0

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in their order."""
        with self._waiting():
            return gather_object([value])

    def all(self, here: bool) -> bool:
        """Whether ``here`` holds on every process; also a barrier."""
        return all(self.gather(here))

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its mean over the processes; all are sent as one."""
        if self.size == 1:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        with self._waiting():
            torch.distributed.all_reduce(flat)
        parts = (flat / self.size).split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(list(tensors), [p.view_as(t) for p, t in zip(parts, tensors, strict=True)])

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.waited += time.perf_counter() - started


class StepGuard:
    """Runs before every step of an optimiser: averages the gradients, clips them, leaves out broken steps.

    A step whose gradients hold NaN or Inf is left out on every process (they see the same average): weights
    and the optimiser's state stay as they are. Adam's fused step does so on the device, without a wait.

    Attributes:
        clip: largest norm of an optimiser's gradients; ``None`` leaves them as they are.
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

    def taken(self) -> list[tuple[str, str]]:
        """The faults since the last call, on the first process alone: all leave the same steps out."""
        skipped = int(self.skipped)
        self.skipped.zero_()
        broken = "loss", "--rl.learning_rate: NaN or Inf in a gradient; lower it"
        return [broken] * skipped if self.world.main else []


def optimizers(algorithm: nn.Module) -> dict[str, torch.optim.Optimizer]:
    """The optimisers among an algorithm's attributes, by name."""
    return {k: v for k, v in vars(algorithm).items() if isinstance(v, torch.optim.Optimizer)}


def weights_digest(module: nn.Module, world: ProcessGroup) -> str:
    """A hash of a module's weights and buffers, which must be the same on all processes."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    if len(set(world.gather(digest.hexdigest()))) > 1:
        raise RuntimeError("the processes' weights have drifted apart; this is a bug of trimtab")
    return digest.hexdigest()
