"""`trimtab policies`: every policy type, its noise, and what one more noise costs; as a Markdown table."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from trimtab.adapters import Conditioning, PolicyAdapter, UserError, load_adapter
from trimtab.adapters.lerobot.injection import NoiseInjector
from trimtab.adapters.loading import quietly
from trimtab.adapters.tiny import TYPES, make_tiny
from trimtab.recipes.full_size import FULL_SIZE, RUNNABLE, full_size
from trimtab.recipes.full_size.weightless import Counting
from trimtab.recipes.support.reporting import write_json

MANY = 16
COLUMNS = (
    "policy",
    "noise of one sample",
    "draws",
    "deterministic",
    "prefix share",
    f"{MANY} noises / 1",
    "counted on",
)


@dataclass
class PoliciesConfig:
    """``trimtab policies``."""

    # Policy types, separated by commas; default: all.
    types: str = ""
    # Count operations at published size where a policy can be built so (else on a tiny instance).
    full_size: bool = True
    # Cameras of the policies at published size.
    cameras: int = 2
    # Time the adapter against the policy's own path instead (repeats of each; 0: count operations).
    time: int = 0
    # Torch threads.
    threads: int = 2
    # Write the rows as JSON too.
    output: Path | None = None

    def __post_init__(self) -> None:
        unknown = [name for name in self.names if name not in TYPES]
        if unknown:
            raise UserError("--types", f"no policy type {', '.join(unknown)}; there are {', '.join(TYPES)}")
        for name in ("time", "threads", "cameras"):
            least = 0 if name == "time" else 1
            if getattr(self, name) < least:
                raise UserError(f"--{name}", f"must be at least {least}, got {getattr(self, name)}")

    @property
    def names(self) -> list[str]:
        return [name for name in map(str.strip, self.types.split(",")) if name] or list(TYPES)


@dataclass
class Row:
    """What is known of one policy type.

    Attributes:
        noise: shape of one sample.
        share: operations of ``encode`` over those of one whole chunk.
        many: operations of one ``encode`` and 16 ``denoise`` over those of one chunk.
        counted_on: instance that was counted.
    """

    type: str
    noise: tuple[int, ...]
    draws: str
    deterministic: bool
    share: float
    many: float
    counted_on: str
    chunk_flops: int
    inert: int = 0
    extra: dict[str, Any] = field(default_factory=dict)

    def cells(self) -> tuple[str, ...]:
        inert = f" ({self.inert} inert)" if self.inert else ""
        return (
            f"`{self.type}`",
            f"{self.noise}{inert}",
            self.draws,
            "yes" if self.deterministic else "no",
            f"{100 * self.share:.0f} %",
            f"{self.many:.1f}",
            self.counted_on,
        )


def main(config: PoliciesConfig) -> None:
    torch.set_num_threads(config.threads)
    rows: list[Any] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in config.names:
            with quietly():
                options = make_tiny(name, Path(folder) / name)
            tiny = load_adapter(options)
            if config.time:
                rows += timings(name, tiny, config)
            else:
                rows.append(count(name, tiny, config))
    cells = [row.cells() for row in rows]
    print(markdown(TIMING_COLUMNS if config.time else COLUMNS, cells))
    if config.output:
        write_json(config.output, [asdict(row) for row in rows])


def markdown(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in (columns, *rows)]
    lines.insert(1, "|" + "---|" * len(columns))
    return "\n".join(lines)


def count(name: str, tiny: PolicyAdapter, config: PoliciesConfig) -> Row:
    """Count the operations of ``encode`` and ``denoise`` of one policy type."""
    generator = torch.Generator().manual_seed(0)
    batch = tiny.preprocess(tiny.example_observation(1, generator))
    noise = torch.randn((1, *tiny.noise_spec.shape), generator=generator).to(tiny.noise_spec.dtype)
    conditioning = tiny.encode(batch)
    same = torch.equal(tiny.denoise(conditioning, noise), tiny.denoise(conditioning, noise))
    adapter, where = tiny, "tiny instance"
    if config.full_size and name in FULL_SIZE:
        adapter, batch = full_size(name, "meta", config.cameras)
        size = sum(parameter.numel() for parameter in adapter.policy.parameters())
        where = f"{size / 1e9:.2f} B" if size >= 1e9 else f"{size / 1e6:.0f} M"
    encode, denoise = operations(adapter, batch)
    one, many = encode + denoise[1], encode + denoise[MANY]
    spec = adapter.noise_spec
    inert = 0 if spec.live is None else int((~spec.live).sum())
    return Row(name, spec.shape, spec.distribution, same, encode / one, many / one, where, one, inert)


def operations(adapter: PolicyAdapter, batch: dict[str, Any]) -> tuple[int, dict[int, int]]:
    """Floating-point operations of ``encode``, and of ``denoise`` for 1 noise and for 16."""
    # PyTorch's counter knows attention as matrix products, but not as the CPU's one fused operation.
    with sdpa_kernel(SDPBackend.MATH), Counting():
        return _operations(adapter, batch)


def _operations(adapter: PolicyAdapter, batch: dict[str, Any]) -> tuple[int, dict[int, int]]:
    with FlopCounterMode(display=False) as counter:
        conditioning = adapter.encode(batch)
    encode, found = counter.get_total_flops(), {}
    device = next(iter(conditioning.tensors.values())).device
    for k in (1, MANY):
        part = min(k, adapter.max_batch or k)
        noise = torch.zeros((part, *adapter.noise_spec.shape), dtype=adapter.noise_spec.dtype, device=device)
        with FlopCounterMode(display=False) as counter:
            adapter.denoise(conditioning.repeat_interleave(part), noise)
        found[k] = counter.get_total_flops() * math.ceil(k / part)  # batches of a kind: one is counted
    return encode, found


# Policies that honour LeRobot's `noise` argument. The others' own path is timed under the injector, which
# watches every call and so slows small policies down.
TAKES_NOISE = ("diffusion", "smolvla", "pi0", "pi05")
TIMING_COLUMNS = ("policy", "size", "own path", "adapter", "adapter / own", f"{MANY} noises / 1")


@dataclass
class Timing:
    """Median seconds per chunk, and the median of the paired ratios."""

    type: str
    size: str
    own: float
    adapter: float
    ratio: float
    many: float

    def cells(self) -> tuple[str, ...]:
        milliseconds = (f"{1e3 * self.own:.1f} ms", f"{1e3 * self.adapter:.1f} ms")
        return (f"`{self.type}`", self.size, *milliseconds, f"{self.ratio:.3f}", f"{self.many:.2f}")


def timings(name: str, tiny: PolicyAdapter, config: PoliciesConfig) -> list[Timing]:
    """Time the adapter against the policy's own public path with the same noise, alternately.

    Both start from the preprocessed batch. The 16 noises include the one ``encode`` they share.
    """
    batch = tiny.preprocess(tiny.example_observation(1, torch.Generator().manual_seed(0)))
    found = [_timing(name, "tiny", tiny, batch, config.time)]
    if config.full_size and name in RUNNABLE and (torch.cuda.is_available() or not name.startswith("pi0")):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        adapter, batch = full_size(name, device, config.cameras)
        found.append(_timing(name, "published", adapter, batch, config.time))
    return found


def _timing(name: str, size: str, adapter: PolicyAdapter, batch: dict[str, Any], repeats: int) -> Timing:
    device, spec = adapter.device, adapter.noise_spec
    noise = torch.randn((MANY, *spec.shape), generator=torch.Generator().manual_seed(1))
    noise = noise.to(device, spec.dtype)

    def own() -> Tensor:
        adapter.policy.reset()
        if name in TAKES_NOISE:
            return adapter.policy.predict_action_chunk(dict(batch), noise=adapter.native_noise(noise[:1]))
        with NoiseInjector(adapter.native_noise(noise[:1])):
            return adapter.policy.predict_action_chunk(dict(batch))

    def ours(k: int) -> Tensor:
        conditioning: Conditioning = adapter.encode(batch)
        return adapter.denoise(conditioning.repeat_interleave(k), noise[:k])

    pairs = []
    for _ in range(repeats + 1):
        pairs.append((_seconds(own, device), _seconds(lambda: ours(1), device)))
    many = median(_seconds(lambda: ours(MANY), device) for _ in range(max(1, repeats // 5)))
    pairs = pairs[1:]  # the first warms up
    single = median(b for _, b in pairs)
    ratio = median(b / a for a, b in pairs)
    return Timing(name, size, median(a for a, _ in pairs), single, ratio, many / single)


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    with torch.inference_mode():
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
