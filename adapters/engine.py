"""How a base's ``encode`` and ``denoise`` run: as they are, through ``torch.compile``, or as CUDA graphs.

A VLA's denoising loop launches thousands of small kernels, and a GPU waits for them longer than it computes.
A CUDA graph launches all at once. It replays one *kind* of call: these tensors, of these shapes and
precisions, and so many noises per observation. A smaller batch of observations is padded to one that has been
recorded. Where that cannot be, one line on stderr says so, and the function runs as it is.
"""

import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module

from trimtab.adapters.base import NoiseToChunk
from trimtab.adapters.conditioning import Conditioning
from trimtab.adapters.cuda_graphs import Recorder, Run, Tensors
from trimtab.adapters.errors import reason

ENGINES = ("eager", "compile", "cuda_graph")
VARIANTS = 64  # networks and shapes that are compiled; torch gives up at 8
MOST = 8  # kinds that one function is recorded for: each keeps its inputs and results in memory
CHECKS = 2  # first results of each number of rows that are compared with those of the function as it is
CLOSE = 0.05  # of the largest entry: rounding of bfloat16 over a whole denoising loop stays below it
NOISE = "noise"

Fix = Callable[[Run], Run]


def say(line: str) -> None:
    print(line, file=sys.stderr)


def use_engine(adapter: NoiseToChunk, name: str) -> None:
    """Let the ``encode`` and ``denoise`` of a loaded and verified adapter run by the engine of this name."""
    obstacle = ""
    if adapter.remembers:
        obstacle = f"a {adapter.policy_type} policy remembers its episode"
    elif name == "cuda_graph" and adapter.device.type != "cuda":
        obstacle = f"the policy runs on {adapter.device.type}, not on CUDA"
    if obstacle and name != "eager":
        say(f"--policy.engine={name}: {obstacle}; it runs as it is")
    if obstacle or name == "eager":
        return
    attach(adapter, f"--policy.engine={name}", compiled if name == "compile" else Recorder(adapter.device))


def attach(adapter: NoiseToChunk, label: str, fix: Fix) -> None:
    """Let what ``adapter`` says may be ``recorded`` run by ``fix``; lines about it begin with ``label``."""
    wrap = {"encode": _encode, "denoise": _denoise}
    adapter.rounding = max(adapter.rounding, CLOSE)  # the first results of a kind are the function's own
    for method in adapter.recorded:
        setattr(adapter, method, wrap[method](adapter, f"{label}: {method}", fix))


def _encode(adapter: NoiseToChunk, label: str, fix: Fix) -> Callable[..., Conditioning]:
    plain = adapter.encode

    def tensors_of(conditioning: Conditioning) -> Tensors:
        if conditioning.lists:
            raise TypeError("it keeps what is no tensor")
        return conditioning.tensors

    engine = Engine(label, adapter.device, fix, lambda given, _: plain(given), tensors_of, Conditioning)

    def encode(batch: dict[str, Any]) -> Conditioning:
        return engine(partial(plain, batch), batch)

    return encode


def _denoise(adapter: NoiseToChunk, label: str, fix: Fix) -> Callable[..., Tensor]:
    plain = adapter.denoise

    def function(given: Tensors, repeats: int) -> Tensor:
        rest = {name: tensor for name, tensor in given.items() if name != NOISE}
        noise = given[NOISE].flatten(0, 1)
        return plain(Conditioning(rest, repeats=repeats), noise).unflatten(0, (-1, repeats))

    engine = Engine(
        label, adapter.device, fix, function, lambda chunk: {"chunk": chunk}, lambda found: found["chunk"]
    )

    def denoise(conditioning: Conditioning, noise: Tensor) -> Tensor:
        adapter.check_noise(conditioning, noise)
        if conditioning.lists:  # which a fixed call would go without
            return plain(conditioning, noise)
        repeats = conditioning.repeats
        given = conditioning.tensors | {NOISE: noise.unflatten(0, (-1, repeats))}
        as_it_is = lambda: plain(conditioning, noise).unflatten(0, (-1, repeats))  # noqa: E731
        return engine(as_it_is, given, repeats).flatten(0, 1)

    return denoise


class Engine[Result]:
    """Runs a function of N rows of tensors by kinds that are fixed at their second call.

    The function gets the tensors on ``device`` alone. One that needs more (instructions, numbers) fails when
    it is fixed, or in a comparison, and runs as it is from then on. One thread at a time.

    Args:
        label: of its lines.
        device: of the tensors.
        fix: makes a call with inputs that stay in place one that is faster.
        function: (tensors, repeats) -> result.
        tensors_of, result_of: a result's tensors, of N rows too, and back.
    """

    def __init__(
        self,
        label: str,
        device: torch.device,
        fix: Fix,
        function: Callable[[Tensors, int], Result],
        tensors_of: Callable[[Result], Tensors],
        result_of: Callable[[Tensors], Result],
    ) -> None:
        self.works, self._full = True, False
        self._label, self._device, self._fix, self._function = label, device, fix, function
        self._tensors_of, self._result_of = tensors_of, result_of
        self._calls: Counter[tuple] = Counter()
        self._checks: Counter[tuple] = Counter()
        self._fixed: dict[tuple, dict[int, tuple[Tensors, Run]]] = {}  # by kind and number of rows

    @torch.no_grad()
    def __call__(self, as_it_is: Callable[[], Result], given: dict[str, Any], repeats: int = 1) -> Result:
        if not self.works:
            return as_it_is()
        tensors = {
            name: value
            for name, value in sorted(given.items())
            if isinstance(value, Tensor) and value.device == self._device
        }
        leads = {value.shape[:1] for value in tensors.values()}
        rows = max(leads)[0] if len(leads) == 1 and leads != {()} else 0  # 0: cannot be padded
        kind = repeats, tuple((n, v.dtype, v.shape[rows > 0 :]) for n, v in tensors.items())
        sizes = self._fixed.setdefault(kind, {})
        size = min((size for size in sizes if size >= rows), default=None)
        if size is None:
            result = as_it_is()
            self._calls[kind, rows] += 1
            if self._calls[kind, rows] == 2:
                self._add(sizes, rows, tensors, repeats)
            return result
        with torch.inference_mode(False):
            found = _call(*sizes[size], tensors, rows)
        if self._checks[kind, rows] == CHECKS:
            return self._result_of(found)
        self._checks[kind, rows] += 1
        result = as_it_is()
        self._compare(found, result)
        return result

    def _add(self, sizes: dict[int, tuple[Tensors, Run]], rows: int, tensors: Tensors, repeats: int) -> None:
        if sum(map(len, self._fixed.values())) >= MOST:
            if not sizes and not self._full:
                self._full = True
                say(f"{self._label}: {MOST} shapes of batches so far; further ones run as they are")
            if not sizes:
                return
            sizes.clear()  # these batches are smaller, and padded from now on
        try:
            with torch.inference_mode(False):
                inputs = {name: value.clone() for name, value in tensors.items()}
                run = self._fix(lambda: self._tensors_of(self._function(inputs, repeats)))
                run()
            sizes[rows] = inputs, run
        except Exception as error:  # of many classes, from the driver to the compiler's exit code
            self._stop(reason(error.__cause__ or error))

    def _compare(self, found: Tensors, result: Result) -> None:
        try:
            expected = self._tensors_of(result)
            same = found.keys() == expected.keys() and all(_close(found[n], expected[n]) for n in found)
        except (TypeError, RuntimeError):  # no tensors, or of other shapes
            same = False
        if not same:
            self._stop("its results differ from the function's own")

    def _stop(self, why: str) -> None:
        self.works = False
        self._fixed.clear()
        say(f"{self._label}: {why}; it runs as it is")


def _call(inputs: Tensors, run: Run, tensors: Tensors, rows: int) -> Tensors:
    """The results for the first ``rows`` of the inputs; behind them the last one is repeated."""
    for name, buffer in inputs.items():
        if len(buffer) > rows > 0:
            buffer[rows:] = tensors[name][-1]
            buffer = buffer[:rows]
        buffer.copy_(tensors[name], non_blocking=True)
    # The next call overwrites them.
    return {name: value[: rows or None].clone() for name, value in run().items()}


def _close(found: Tensor, expected: Tensor) -> bool:
    if (found.dtype, found.shape) != (expected.dtype, expected.shape):
        return False
    if not expected.is_floating_point():
        return torch.equal(found, expected)
    farthest = (found.float() - expected.float()).abs().max()
    return bool(farthest <= CLOSE * expected.float().abs().max())


def compiled(function: Run) -> Run:
    """The function with the networks that it calls through ``torch.compile``; all else of it stays Python.

    Compiled as a whole, its loop would be unrolled, which takes minutes.
    """
    torch._dynamo.config.recompile_limit = max(VARIANTS, torch._dynamo.config.recompile_limit)
    networks = {net: torch.compile(net.forward, dynamic=False) for net in _called(function)}

    def run() -> Tensors:
        try:
            for net, forward in networks.items():
                net.forward = forward
            return function()
        finally:
            for net in networks:
                del net.forward

    return run


def _called(function: Run) -> list[Any]:
    """The outermost networks of several layers that a function calls."""
    found: dict[Any, None] = {}
    inside = [0]

    def enter(net: nn.Module, args: Any) -> None:
        if not inside[0] and next(net.children(), None) is not None:
            found[net] = None
        inside[0] += 1

    def leave(net: nn.Module, args: Any, output: Any) -> None:
        inside[0] -= 1

    hooks = [module.register_module_forward_pre_hook(enter)]
    hooks.append(module.register_module_forward_hook(leave, always_call=True))
    try:
        function()
    finally:
        for hook in hooks:
            hook.remove()
    return list(found)
