"""Environment steps per second of two processes beside one, each on one thread, started as a user would.

    python -m tests.benchmarks.processes --base=outputs/base --task=button-press-topdown-v3

``accelerate launch`` runs this module again; its first process writes what it has timed. Timed is from the
first chunk after learning has begun to the end: collecting, denoising, learning and waiting for each other,
not the start of the program. Environments are stepped in each process, so that a process is a core.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from trimtab.adapters import PolicyConfig, load_adapter
from trimtab.recipes.support.launched import make_accelerator
from trimtab.recipes.support.reporting import write_json
from trimtab.rl.algorithms import AlgorithmConfig
from trimtab.rl.budget import TrainConfig
from trimtab.rl.envs.metaworld import MetaworldStateConfig
from trimtab.rl.envs.vector import ChunkVectorEnv
from trimtab.rl.runner import PolicyRunner
from trimtab.rl.trainer import Trainer

COUNTS = (1, 2)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.processes", description=__doc__)
    parser.add_argument("--base", required=True, help="folder of a base policy that `trimtab base` made")
    parser.add_argument("--task", default="button-press-topdown-v3")
    parser.add_argument("--episode-length", type=int, default=160)
    parser.add_argument("--algorithm", default="dsrl_sac", help="with its defaults")
    parser.add_argument("--num-envs", type=int, default=8, help="of each process")
    parser.add_argument("--env-steps", type=int, default=3000, help="of one process; of two, twice as many")
    parser.add_argument("--updates-per-transition", type=float, default=2.0)
    parser.add_argument("--repetitions", type=int, default=5, help="pairs of runs")
    parser.add_argument("--output", type=Path, help="JSON")
    parser.add_argument("--worker", type=Path, help="be one process, and write there (the launcher's)")
    return parser.parse_args(argv)


def work(options: argparse.Namespace) -> None:
    """One process's share."""
    torch.set_num_threads(1)
    accelerator = make_accelerator("cpu")
    env = MetaworldStateConfig(task=options.task, episode_length=options.episode_length)
    runner = PolicyRunner(load_adapter(PolicyConfig(path=options.base, device="cpu")), env)
    train = TrainConfig(
        env_steps=options.env_steps,
        warmup_transitions=0,
        first_update=min(256, max(16, options.env_steps // 64)),
        updates_per_transition=options.updates_per_transition,
        catch_up=False,
        log_every=options.env_steps,
    )
    rl = AlgorithmConfig.get_choice_class(options.algorithm)()
    begun: list[tuple[float, int, int]] = []
    lines: list[dict[str, Any]] = []
    with ChunkVectorEnv(env, options.num_envs, 0, runner.adapter.n_obs_steps) as vec:
        trainer = Trainer(runner, vec, accelerator, train, rl, progress=False, on_metrics=lines.append)

        def note(episodes: list) -> None:
            if trainer.updates and not begun:
                begun.append((time.perf_counter(), trainer.env_steps, trainer.updates))

        trainer.on_step = note
        trainer.run()
        ended = time.perf_counter()
    if accelerator.is_main_process:
        started, steps, updates = begun[0]
        found = {
            "env_steps_per_second": (trainer.env_steps - steps) / (ended - started),
            "updates_per_env_step": (trainer.updates - updates) / (trainer.env_steps - steps),
            "shares": {k: v for k, v in lines[-1].items() if k.startswith("seconds_share/")},
        }
        write_json(options.worker, found)
    accelerator.end_training()


def launch(options: argparse.Namespace, processes: int) -> dict[str, Any]:
    """Run so many processes by ``accelerate launch``; what the first one found."""
    kind = ["--multi_gpu"] if processes > 1 else ["--cpu"]  # without a GPU that is torchrun and gloo
    command = [
        *(sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *kind),
        *("--num_processes", str(processes), "--num_machines", "1", "--mixed_precision", "no"),
        *("--dynamo_backend", "no", "--num_cpu_threads_per_process", "1", "--main_process_port", "0"),
        *("-m", "tests.benchmarks.processes"),
    ]
    own = {"env_steps": options.env_steps * processes, "output": None}
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    with tempfile.TemporaryDirectory() as folder:
        values = vars(options) | own | {"worker": Path(folder) / "process.json"}
        said = [f"--{name.replace('_', '-')}={value}" for name, value in values.items() if value is not None]
        done = subprocess.run([*command, *said], capture_output=True, text=True, env=one_thread)
        if done.returncode:
            raise SystemExit(f"a run in {processes} processes failed:\n{done.stderr}")
        return json.loads(values["worker"].read_text(encoding="utf-8"))


def run_processes(options: argparse.Namespace) -> dict[str, Any]:
    """Pairs of runs in one and in two processes, in alternating order.

    Returns:
        by number of processes, ``env_steps_per_second`` of each turn, their ``median``, and what else the
        last one said; ``ratio``: the median of the ``ratios`` within a turn.
    """
    runs: dict[int, list[dict[str, Any]]] = {count: [] for count in COUNTS}
    for turn in range(options.repetitions):
        for count in COUNTS if turn % 2 == 0 else reversed(COUNTS):
            runs[count].append(launch(options, count))
            speed = runs[count][-1]["env_steps_per_second"]
            print(f"turn {turn + 1}, {count} process(es): {speed:.1f} steps per second", flush=True)
    speeds = {count: [run["env_steps_per_second"] for run in found] for count, found in runs.items()}
    ratios = [two / one for one, two in zip(speeds[1], speeds[2], strict=True)]
    found = {
        str(count): {
            **runs[count][-1],
            "env_steps_per_second": [round(value, 1) for value in speeds[count]],
            "median": round(statistics.median(speeds[count]), 1),
        }
        for count in COUNTS
    }
    ratio = {"ratio": round(statistics.median(ratios), 3), "ratios": [round(value, 3) for value in ratios]}
    return {"processes": found, **ratio, "cores": os.cpu_count()}


def table(found: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["| processes | environment steps per second | by one process: median (range) |", "|---|---|---|"]
    ratios = found["ratios"]
    for count, row in found["processes"].items():
        ratio = "1" if count == "1" else f"{found['ratio']:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        lines.append(f"| {count} | {row['median']:.0f} | {ratio} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    if options.worker:
        work(options)
        return
    found = run_processes(options)
    print(table(found))
    if options.output:
        write_json(options.output, found)


if __name__ == "__main__":
    main()
