"""What noise does to a policy's chunks: measured on its function alone, without an environment."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median

import torch
from torch import Tensor

from trimtab.adapters.base import NoiseToChunk
from trimtab.adapters.conditioning import Conditioning

BLOCKS = 16  # noise rows are resampled in at most so many blocks
MANY = 16  # noises in the batch whose cost is compared with the cost of one
CLOSE = 4  # observations on which the effect of single rows and columns is measured
SLACK = 4.0  # how far above the rounding seen a difference must lie to count
TINY = 1e-7  # rounding of float32, relative to the chunk


@dataclass
class Steerability:
    """How a policy's executed chunk depends on its noise, in the units of the policy's own chunks."""

    finite: bool  # every chunk was
    repeat_difference: float  # largest difference between two calls with the same noises
    noise_difference: float  # largest difference between chunks of one observation from different noises
    floor: float  # differences up to here are rounding: the same noise elsewhere in a batch, and alone
    spread: Tensor  # (steps, action_dim) standard deviation over noises, root mean square over observations
    # Standard deviation due to the noise over the total one (over observations and noises), root mean square
    # over the entries of the chunk.
    authority: float
    column_effect: Tensor  # (dim,) root mean square change of the chunk where one noise dimension is redrawn
    row_effect: Tensor  # (blocks, steps) the same for blocks of noise rows; empty where noise has no rows
    row_blocks: list[int]  # first noise row of each block, and the end of the last
    declared_inert: int  # entries that the adapter says are inert; redrawn together ...
    inert_difference: float  # ... with this largest change of a chunk
    observations: int
    noises: int
    rounding: float = 0.0  # share of the noise's effect by which the same noise's chunks may differ
    # (median, least, most) for encode of one observation, denoise of 1 noise and of 16.
    seconds: dict[str, tuple[float, float, float]] = field(default_factory=dict)

    @property
    def deterministic(self) -> bool:
        """Whether the same noise gives the same chunk: to the bit, or to ``rounding``."""
        return self.repeat_difference <= self.rounding * self.noise_difference

    @property
    def blind(self) -> bool:
        """Whether no noise changes the chunk by more than rounding does."""
        return self.noise_difference <= self.floor

    @property
    def inert_columns(self) -> list[int]:
        """Noise dimensions that changed nothing when drawn anew."""
        return torch.nonzero(self.column_effect <= self.floor).flatten().tolist()


def denoise_all(adapter: NoiseToChunk, conditioning: Conditioning, noises: Tensor) -> Tensor:
    """Chunks (K, steps, action_dim) for K noises of one observation, in batches that the policy takes."""
    parts = noises.split(min(adapter.max_batch or MANY, MANY))
    chunks = [adapter.denoise(conditioning.repeat_interleave(len(part)), part) for part in parts]
    return torch.cat(chunks).float().cpu()


def measure(
    adapter: NoiseToChunk,
    observations: list[Conditioning],
    noises: int = 16,
    seed: int = 0,
    repeats: int = 5,
    again: Callable[[], Conditioning] | None = None,
) -> Steerability:
    """Measure what noise does to the executed chunks.

    Args:
        observations: encoded observations, one row each; two or more, or the noise's share of the spread
            means nothing.
        noises: how many for each observation; all observations meet the same ones, drawn from ``seed``.
        repeats: of each timing; 0 times nothing.
        again: encodes one observation, to be timed.
    """
    generator = torch.Generator().manual_seed(seed)
    spec = adapter.noise_spec

    def draw(count: int) -> Tensor:
        return torch.randn((count, *spec.shape), generator=generator).to(adapter.device, spec.dtype)

    def chunks_at(few: list[Conditioning], noises: Tensor) -> Tensor:  # (O, K, T, A)
        return torch.stack([denoise_all(adapter, conditioning, noises) for conditioning in few])

    noise = draw(noises)
    chunks, repeat = chunks_at(observations, noise), chunks_at(observations, noise)
    finite = bool(torch.isfinite(chunks).all() and torch.isfinite(repeat).all())
    within = chunks.var(1, unbiased=False).mean(0)
    total = chunks.flatten(0, 1).var(0, unbiased=False)
    share = torch.where(total > 0, within / total.clamp_min(1e-30), 0.0)
    fresh, first, few = draw(1), noise[:1], observations[:CLOSE]
    same, base = chunks_at(few, first.expand_as(noise)), chunks_at(few, first)

    def effects(noises: Tensor) -> Tensor:  # (K, T, A) change against ``first``, root mean square over few
        return (chunks_at(few, noises) - base).square().mean(0).sqrt()

    floor = SLACK * float((same - base).abs().max()) + TINY * float(chunks.abs().max())
    columns = _resampled(first, fresh, list(range(spec.shape[-1] + 1)), -1)
    blocks: list[int] = []
    row_effect = torch.zeros(0, chunks.shape[2])
    if len(spec.shape) == 2:
        rows = spec.shape[0]
        blocks = sorted({round(i * rows / min(BLOCKS, rows)) for i in range(min(BLOCKS, rows) + 1)})
        row_effect = effects(_resampled(first, fresh, blocks, 1)).square().mean(-1).sqrt()
    column_effect = effects(columns).square().mean((-1, -2)).sqrt()
    inert, inert_difference = 0, 0.0
    if spec.live is not None:
        inert = int((~spec.live).sum())
        mixed = torch.where(spec.live.to(first.device), first, fresh)
        inert_difference = float(effects(mixed).max())
    return Steerability(
        finite=finite,
        repeat_difference=float((chunks - repeat).abs().max()),
        noise_difference=float((chunks - chunks[:, :1]).abs().max()),
        floor=floor,
        spread=within.sqrt(),
        authority=float(share.mean().sqrt()),
        column_effect=column_effect,
        row_effect=row_effect,
        row_blocks=blocks,
        declared_inert=inert,
        inert_difference=inert_difference,
        observations=len(observations),
        noises=noises,
        rounding=adapter.rounding,
        seconds=_times(adapter, observations[0], draw(MANY), repeats, again) if repeats else {},
    )


def _resampled(noise: Tensor, fresh: Tensor, edges: list[int], axis: int) -> Tensor:
    """Copies of ``noise`` (1, ...), each drawn anew along ``axis`` from one edge to the next."""
    copies = []
    for start, end in pairwise(edges):
        copies.append(noise.clone())
        copies[-1].narrow(axis, start, end - start).copy_(fresh.narrow(axis, start, end - start))
    return torch.cat(copies)


def _times(
    adapter: NoiseToChunk,
    conditioning: Conditioning,
    noises: Tensor,
    repeats: int,
    again: Callable[[], Conditioning] | None,
) -> dict[str, tuple[float, float, float]]:
    wait = torch.cuda.synchronize if adapter.device.type == "cuda" else lambda: None

    def seconds(call: Callable[[], object]) -> tuple[float, float, float]:
        times = []
        for _ in range(repeats + 1):  # the first run warms up
            wait()
            start = time.perf_counter()
            call()
            wait()
            times.append(time.perf_counter() - start)
        return median(times[1:]), min(times[1:]), max(times[1:])

    calls: dict[str, Callable[[], object] | None] = {
        "encode": again,
        "denoise_1": lambda: adapter.denoise(conditioning, noises[:1]),
        f"denoise_{MANY}": lambda: denoise_all(adapter, conditioning, noises),
    }
    return {name: seconds(call) for name, call in calls.items() if call}
