"""How updates run: as they are, with networks through ``torch.compile``, or recorded as CUDA graphs.

Where that cannot be, one line on stderr says so, and updates run as they are.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.adapters.engine import VARIANTS, say
from trimtab.adapters.errors import reason
from trimtab.policies.networks import EnsembleMLP
from trimtab.rl.data.replay import Batch

PRECISIONS = ("float32", "bfloat16")
WARM_UP = 3  # updates of a kind before it is recorded: optimisers make their state in the first

Learn = Callable[[Batch], dict[str, Tensor]]


def has_bfloat16(device: torch.device) -> bool:
    """Whether ``device`` has instructions for products of bfloat16; without them they are slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


def use_bfloat16(precision: str, device: torch.device) -> bool:
    """Whether to multiply in bfloat16; where ``device`` has none, a line says so."""
    wanted = precision == "bfloat16"
    if wanted and not has_bfloat16(device):
        say(f"--rl.precision={precision}: this {device.type} has no bfloat16; float32 it is")
        return False
    return wanted


class Compiled:
    """Runs an update with its networks through ``torch.compile``.

    What cannot be compiled (no C++ compiler, a backend that fails) runs as it is. Who acts is not concerned.
    """

    def __init__(self, algorithm: nn.Module) -> None:
        self.algorithm, self.works = algorithm, True
        self._compiled: dict[nn.Module, Callable[..., Tensor]] = {}
        torch._dynamo.config.recompile_limit = max(VARIANTS, torch._dynamo.config.recompile_limit)

    def __call__(self, learn: Learn, batch: Batch, phase: tuple[int, ...]) -> dict[str, Tensor]:
        if not self._compiled:
            networks: list[Any] = [part for part in self.algorithm.modules() if isinstance(part, EnsembleMLP)]
            actor: Any = self.algorithm.actor
            networks.append(actor.net)
            self._compiled = {net: self._compile(net.forward) for net in networks}
        for net, forward in self._compiled.items():
            net.forward = forward
        try:
            return learn(batch)
        finally:
            for net in self._compiled:
                del net.forward

    def _compile(self, plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
        compiled = torch.compile(plain, dynamic=False)  # every shape comes back in each update

        def forward(*args: Any, **options: Any) -> Tensor:
            if self.works:
                try:
                    return compiled(*args, **options)
                except Exception as error:  # of many classes, from dynamo to the compiler's exit code
                    self.works = False
                    why = reason(error.__cause__ or error)
                    say(f"--rl.engine=compile: cannot compile here ({why}); it runs uncompiled")
            return plain(*args, **options)

        return forward


class Captured:
    """Records an update as a CUDA graph after a few calls, and replays it from then on.

    Small networks on a large GPU spend their time in launching kernels; a graph launches them all at once, on
    the same memory. What an update does depends on its number, so there is one graph for each phase. Draws
    come from the device's default generator, which a graph advances as the update itself does. Where
    recording fails, updates go on as they are: what was being recorded has not been executed.
    """

    def __init__(self, device: torch.device) -> None:
        self.works = True
        self._stream = torch.cuda.Stream(device)
        self._seen: Counter[tuple] = Counter()
        self._recorded: dict[tuple, tuple[torch.cuda.CUDAGraph, Batch, dict[str, Tensor]]] = {}

    def __call__(self, learn: Learn, batch: Batch, phase: tuple[int, ...]) -> dict[str, Tensor]:
        kind = phase, tuple((name, value.shape) for name, value in batch.items())
        if self.works and kind not in self._recorded and self._seen[kind] >= WARM_UP:
            self._record(kind, learn, batch)
        if not self.works or kind not in self._recorded:
            self._seen[kind] += 1
            return self._aside(learn, batch)
        graph, inputs, metrics = self._recorded[kind]
        for name, value in batch.items():
            inputs[name].copy_(value, non_blocking=True)
        graph.replay()
        return {name: value.clone() for name, value in metrics.items()}  # the next replay overwrites them

    def _aside(self, learn: Learn, batch: Batch) -> dict[str, Tensor]:
        """On the stream on which graphs are recorded: autograd's nodes remember theirs."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            metrics = learn(batch)
        current.wait_stream(self._stream)
        return metrics

    def _record(self, kind: tuple, learn: Learn, batch: Batch) -> None:
        inputs, graph = {name: value.clone() for name, value in batch.items()}, torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self._stream.device)
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                metrics = learn(inputs)
            self._recorded[kind] = graph, inputs, metrics
        except RuntimeError as error:
            self.works = False
            self._recorded.clear()
            torch.cuda.set_stream(current)  # a failed recording leaves its own
            say(f"--rl.engine=cuda_graph: cannot be captured ({reason(error)}); it runs as it is")


def make_engine(
    name: str, algorithm: nn.Module, accelerator: Any, obstacle: str
) -> Compiled | Captured | None:
    """The engine of this name for an algorithm; ``None``: updates run as they are.

    ``obstacle`` says why the algorithm's updates cannot be recorded as CUDA graphs, if so.
    """
    if name == "compile":
        return Compiled(algorithm)
    if name == "eager":
        return None
    if accelerator.device.type != "cuda":
        obstacle = f"the learner runs on {accelerator.device.type}, not on CUDA"
    elif accelerator.num_processes > 1:
        obstacle = "gradients are averaged over several processes"
    if obstacle:
        say(f"--rl.engine={name}: {obstacle}; updates run as they are")
        return None
    return Captured(accelerator.device)
