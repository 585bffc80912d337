"""Environment steps per second of two processes beside one, each on one thread, started as a user would.

``accelerate launch`` runs this module; its first process writes what it has timed. Timed is from the first
chunk after learning has begun to the end: collecting, denoising, learning and waiting for each other, not the
start of the program.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from trimtab.adapters import PolicyConfig, UserError, load_adapter
from trimtab.adapters.errors import reason
from trimtab.recipes.bench.report import median_and_range
from trimtab.rl.algorithms import AlgorithmConfig
from trimtab.rl.budget import TrainConfig
from trimtab.rl.envs.metaworld import MetaworldStateConfig
from trimtab.rl.envs.vector import ChunkVectorEnv
from trimtab.rl.runner import PolicyRunner
from trimtab.rl.train import Trainer

COUNTS = (1, 2)


@dataclass
class Job:
    """What each process does; environments are stepped in it, so that a process is a core.

    Attributes:
        base, task, episode_length: policy and environment.
        algorithm: by name, with its defaults.
        num_envs: of each process.
        env_steps: of all processes.
        updates_per_transition: of each process's transitions.
        output: where the first process writes.
    """

    base: str
    task: str
    episode_length: int
    algorithm: str
    num_envs: int
    env_steps: int
    updates_per_transition: float
    output: str


def work(job: Job) -> None:
    """One process's share."""
    from trimtab.recipes.support.launched import make_accelerator

    torch.set_num_threads(1)
    accelerator = make_accelerator("cpu")
    env = MetaworldStateConfig(task=job.task, episode_length=job.episode_length)
    runner = PolicyRunner(load_adapter(PolicyConfig(path=job.base, device="cpu")), env)
    rl = AlgorithmConfig.get_choice_class(job.algorithm)()
    train = TrainConfig(
        env_steps=job.env_steps,
        warmup_transitions=0,
        first_update=min(256, max(16, job.env_steps // 64)),
        updates_per_transition=job.updates_per_transition,
        catch_up=False,
        log_every=job.env_steps,
    )
    begun: list[tuple[float, int, int]] = []
    lines: list[dict[str, Any]] = []
    with ChunkVectorEnv(env, job.num_envs, 0, runner.adapter.n_obs_steps) as vec:
        trainer = Trainer(runner, vec, accelerator, train, rl, progress=False, on_metrics=lines.append)

        def note(episodes: list) -> None:
            if trainer.updates and not begun:
                begun.append((time.perf_counter(), trainer.env_steps, trainer.updates))

        trainer.on_step = note
        trainer.run()
        ended = time.perf_counter()
    if accelerator.is_main_process:
        (started, steps, updates) = begun[0]
        found = {
            "env_steps_per_second": (trainer.env_steps - steps) / (ended - started),
            "updates_per_env_step": (trainer.updates - updates) / (trainer.env_steps - steps),
            "shares": {k: v for k, v in lines[-1].items() if k.startswith("seconds_share/")},
        }
        Path(job.output).write_text(json.dumps(found), encoding="utf-8")
    accelerator.end_training()


def launch(job: Job, processes: int) -> dict[str, Any]:
    """Run ``job`` in so many processes by ``accelerate launch``; what the first one found.

    Raises:
        UserError: it failed.
    """
    kind = ["--multi_gpu"] if processes > 1 else ["--cpu"]  # without a GPU that is torchrun and gloo
    command = [
        *(sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *kind),
        *("--num_processes", str(processes), "--num_machines", "1", "--mixed_precision", "no"),
        *("--dynamo_backend", "no", "--num_cpu_threads_per_process", "1", "--main_process_port", "0"),
        *("-m", __name__, json.dumps(asdict(job))),
    ]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, capture_output=True, text=True, env=one_thread)
    if done.returncode:
        why = reason(RuntimeError(done.stderr), last=True)
        raise UserError("--what=processes", f"a run in {processes} processes failed ({why})")
    return json.loads(Path(job.output).read_text(encoding="utf-8"))


def run_processes(job: Job, repetitions: int) -> dict[str, Any]:
    """Pairs of runs in one and in two processes, in alternating order.

    ``env_steps`` is that of one process; two collect twice as many, so that a pair takes about as long each.

    Returns:
        by number of processes, ``env_steps_per_second`` of each turn, their ``median``, and what else the
        last one said; ``ratio``: the median of the ``ratios`` within a turn.
    """
    runs: dict[int, list[dict[str, Any]]] = {count: [] for count in COUNTS}
    for turn in range(repetitions):
        for count in COUNTS if turn % 2 == 0 else reversed(COUNTS):
            mine = Job(**{**asdict(job), "env_steps": job.env_steps * count})
            runs[count].append(launch(mine, count))
            speed = runs[count][-1]["env_steps_per_second"]
            print(
                f"turn {turn + 1}, {count} process(es): {speed:.1f} environment steps per second", flush=True
            )
    speeds = {count: [run["env_steps_per_second"] for run in found] for count, found in runs.items()}
    ratios = [two / one for one, two in zip(speeds[1], speeds[2], strict=True)]
    found: dict[str, Any] = {
        str(count): {
            "env_steps_per_second": [round(value, 1) for value in speeds[count]],
            "median": round(statistics.median(speeds[count]), 1),
            "updates_per_env_step": round(runs[count][-1]["updates_per_env_step"], 4),
            "shares": runs[count][-1]["shares"],
        }
        for count in COUNTS
    }
    ratio = {"ratio": round(statistics.median(ratios), 3), "ratios": [round(value, 3) for value in ratios]}
    return {"processes": found, **ratio, "setting": asdict(job), "cores": os.cpu_count()}


def processes_table(found: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["| processes | environment steps per second | by one process: median (range) |", "|---|---|---|"]
    for count, row in found["processes"].items():
        ratio = median_and_range(found) if count != "1" else "1"
        lines.append(f"| {count} | {row['median']:.0f} | {ratio} |")
    return "\n".join(lines)


if __name__ == "__main__":
    work(Job(**json.loads(sys.argv[1])))
