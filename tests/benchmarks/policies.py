"""What encoding and denoising cost, of every policy type: operations, or with ``--time`` seconds.

    python -m tests.benchmarks.policies --output=recipes/cli/policies.json

makes the rows that ``trimtab policies`` prints.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Callable
from copy import copy
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.benchmarks.full_size import FULL_SIZE, RUNNABLE, full_size
from tests.benchmarks.weightless import Counting
from tests.helpers.tiny import TYPES, make_tiny
from trimtab.adapters import PolicyAdapter, load_adapter
from trimtab.adapters.engine import CHECKS, ENGINES, use_engine
from trimtab.adapters.lerobot.injection import NoiseInjector
from trimtab.adapters.loading import quietly
from trimtab.recipes.cli.policies import COLUMNS, MANY, cells, markdown
from trimtab.recipes.support.reporting import write_json

# Policies that honour LeRobot's `noise` argument. The others' own path is timed under the injector, which
# watches every call and so slows small policies down.
TAKES_NOISE = ("diffusion", "smolvla", "pi0", "pi05")
ENGINE_COLUMNS = ("engine", "own / engine", f"{MANY} / 1", f"peak GiB of {MANY}, adapter / engine")
TIMING_COLUMNS = ("policy", "size", "own path", "adapter", "adapter / own", f"{MANY} noises / 1")


def example(tiny: PolicyAdapter) -> dict[str, Any]:
    """A preprocessed observation."""
    return tiny.preprocess(tiny.example_observation(1, torch.Generator().manual_seed(0)))


def count(name: str, tiny: PolicyAdapter, published: bool = True, cameras: int = 2) -> dict[str, Any]:
    """Count the operations of ``encode`` and ``denoise``, at published size where that can be built.

    Returns:
        ``noise``: shape of one sample; ``share``: operations of ``encode`` over those of one whole chunk;
        ``many``: those of one ``encode`` and 16 ``denoise`` over those of one chunk; and the other columns.
    """
    batch, generator = example(tiny), torch.Generator().manual_seed(1)
    noise = torch.randn((1, *tiny.noise_spec.shape), generator=generator).to(tiny.noise_spec.dtype)
    conditioning = tiny.encode(batch)
    same = torch.equal(tiny.denoise(conditioning, noise), tiny.denoise(conditioning, noise))
    adapter, counted_on = tiny, "tiny instance"
    if published and name in FULL_SIZE:
        adapter, batch = full_size(name, "meta", cameras)
        size = sum(parameter.numel() for parameter in adapter.policy.parameters())
        counted_on = f"{size / 1e9:.2f} B" if size >= 1e9 else f"{size / 1e6:.0f} M"
    encode, denoise = operations(adapter, batch)
    spec, one = adapter.noise_spec, encode + denoise[1]
    return {
        "type": name,
        "noise": list(spec.shape),
        "inert": 0 if spec.live is None else int((~spec.live).sum()),
        "draws": spec.distribution,
        "deterministic": same,
        "share": encode / one,
        "many": (encode + denoise[MANY]) / one,
        "counted_on": counted_on,
        "chunk_flops": one,
    }


def operations(adapter: PolicyAdapter, batch: dict[str, Any]) -> tuple[int, dict[int, int]]:
    """Floating-point operations of ``encode``, and of ``denoise`` for 1 noise and for 16."""
    # PyTorch's counter knows attention as matrix products, but not as the CPU's one fused operation.
    with sdpa_kernel(SDPBackend.MATH), Counting():
        with FlopCounterMode(display=False) as counter:
            conditioning = adapter.encode(batch)
        encode, found = counter.get_total_flops(), {}
        device = next(iter(conditioning.tensors.values())).device
        for k in (1, MANY):
            part = min(k, adapter.max_batch or k)
            shape = (part, *adapter.noise_spec.shape)
            noise = torch.zeros(shape, dtype=adapter.noise_spec.dtype, device=device)
            with FlopCounterMode(display=False) as counter:
                adapter.denoise(conditioning.repeat_interleave(part), noise)
            found[k] = counter.get_total_flops() * math.ceil(k / part)  # all batches cost what one does
    return encode, found


def timings(
    name: str, tiny: PolicyAdapter, repeats: int, published: bool, cameras: int, engine: str = "eager"
) -> list[dict]:
    """Time the adapter against the policy's own public path with the same noise, alternately.

    Both start from the preprocessed batch. The 16 noises include the one ``encode`` they share. Another
    ``engine`` than eager is timed beside them.
    """
    found = [timing(name, "tiny", tiny, example(tiny), repeats, engine)]
    if published and name in RUNNABLE and (torch.cuda.is_available() or not name.startswith("pi0")):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        found.append(timing(name, "published", *full_size(name, device, cameras), repeats, engine))
    return found


def timing(
    name: str,
    size: str,
    adapter: PolicyAdapter,
    batch: dict[str, Any],
    repeats: int,
    engine: str = "eager",
) -> dict[str, Any]:
    """Median seconds per chunk, and the median of the paired ratios; on CUDA, peak GiB by path."""
    spec, peak = adapter.noise_spec, dict[str, float]()
    noise = torch.randn((MANY, *spec.shape), generator=torch.Generator().manual_seed(1))
    noise = noise.to(adapter.device, spec.dtype)

    def own() -> Tensor:
        adapter.policy.reset()
        native = adapter.native_noise(noise[:1])
        if name in TAKES_NOISE:
            return adapter.policy.predict_action_chunk(dict(batch), noise=native)
        with NoiseInjector(native):
            return adapter.policy.predict_action_chunk(dict(batch))

    def ours(adapter: PolicyAdapter, k: int) -> Tensor:
        return adapter.denoise(adapter.encode(batch).repeat_interleave(k), noise[:k])

    def seconds(path: str) -> float:
        cuda = adapter.device.type == "cuda"
        wait = torch.cuda.synchronize if cuda else lambda: None
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        wait()
        start = time.perf_counter()
        with torch.inference_mode():
            calls[path]()
        wait()
        elapsed = time.perf_counter() - start
        if cuda:
            peak[path] = torch.cuda.max_memory_allocated() / 2**30
        return elapsed

    calls: dict[str, Callable[[], Any]] = {"own": own, "adapter": partial(ours, adapter, 1)}
    singles, several, warm = ["own", "adapter"], {"many": partial(ours, adapter, MANY)}, 1
    if engine != "eager":
        other = copy(adapter)
        use_engine(other, engine)
        calls["engine"], several["engine_many"] = partial(ours, other, 1), partial(ours, other, MANY)
        singles, warm = [*singles, "engine"], 2 + CHECKS  # until its results are no longer compared
    calls |= several
    turns = [{path: seconds(path) for path in singles} for _ in range(repeats + warm)][warm:]
    rarely = [{path: seconds(path) for path in several} for _ in range(max(1, repeats // 5) + warm)][warm:]
    found = {path: median(turn[path] for turn in turns) for path in singles}
    many = {path: median(turn[path] for turn in rarely) for path in several}
    found |= {
        "ratio": median(t["adapter"] / t["own"] for t in turns),
        "many": many["many"] / found["adapter"],
    }
    if engine != "eager":
        found["faster"] = median(turn["own"] / turn["engine"] for turn in turns)
        found["engine_many"] = many["engine_many"] / found["engine"]
    return {"type": name, "size": size, **found, "peak": peak}


def timing_cells(row: dict[str, Any]) -> list[str]:
    milliseconds = [f"{1e3 * row[path]:.1f} ms" for path in ("own", "adapter")]
    found = [f"`{row['type']}`", row["size"], *milliseconds, f"{row['ratio']:.3f}", f"{row['many']:.2f}"]
    if "engine" in row:
        found += [f"{1e3 * row['engine']:.1f} ms", f"{row['faster']:.2f}", f"{row['engine_many']:.2f}"]
        found.append(" / ".join(f"{row['peak'].get(path, 0):.1f}" for path in ("many", "engine_many")))
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.policies", description=__doc__)
    parser.add_argument("--types", default=",".join(TYPES), help="policy types, separated by commas")
    parser.add_argument("--tiny", action="store_true", help="tiny instances alone")
    parser.add_argument("--cameras", type=int, default=2, help="of the policies at published size")
    parser.add_argument("--time", type=int, default=0, help="repeats to time, instead of counting")
    parser.add_argument("--engine", default="eager", choices=ENGINES, help="timed beside, with --time")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--output", type=Path, help="write the rows as JSON, too")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.types.split(","):
            with quietly():
                tiny = load_adapter(make_tiny(name, Path(folder) / name))
            if options.time:
                rows += timings(name, tiny, options.time, not options.tiny, options.cameras, options.engine)
            else:
                rows.append(count(name, tiny, not options.tiny, options.cameras))
    if options.time:
        columns = TIMING_COLUMNS + ENGINE_COLUMNS * (options.engine != "eager")
        print(markdown(columns, [timing_cells(row) for row in rows]))
    else:
        print(markdown(COLUMNS, [cells(row) for row in rows]))
    if options.output:
        write_json(options.output, rows)


if __name__ == "__main__":
    main()
