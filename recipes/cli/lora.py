"""`trimtab lora`: fine-tune a LeRobot policy instead of steering it, on a dataset or on its own successes."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean as mean
from typing import Any

import draccus
from lerobot.configs.default import DatasetConfig
from lerobot.envs.configs import EnvConfig

from trimtab.adapters import PolicyAdapter, PolicyConfig, UserError, load_adapter
from trimtab.adapters.checkpoint.folder import is_peft, is_server, resolve_folder
from trimtab.adapters.errors import at_least
from trimtab.policies.artefact import is_artefact
from trimtab.recipes.cli.adapt import check_run
from trimtab.recipes.finetune.data import REPO_ID, Recorder
from trimtab.recipes.finetune.filtered_bc import rounds
from trimtab.recipes.finetune.rollouts import Rollouts
from trimtab.recipes.finetune.training import FineTuner, TuningConfig
from trimtab.recipes.support.console import new_output_dir
from trimtab.recipes.support.option_dicts import repeatable
from trimtab.recipes.support.reporting import (
    MetricsWriter,
    rate_text,
    results_of,
    summaries,
    table,
    write_json,
)
from trimtab.recipes.support.session import Session, describe
from trimtab.recipes.support.shared_configs import EpisodesConfig, MachineConfig
from trimtab.rl.data.demonstration_data import rate_warning
from trimtab.rl.envs.hooks import check_base
from trimtab.rl.evaluation import Evaluation, require_success
from trimtab.rl.seeds import training_seed

DATASET_STEPS = 20_000  # gradient steps by default
LOG_EVERY = 100  # gradient steps behind one number of the loss curve


@dataclass
class FineTunedEvalConfig(EpisodesConfig):
    """How the base and the fine-tuned policy are evaluated."""

    # Not searched here; `trimtab eval` on the result does.
    constant_candidates: int = 0

    def __post_init__(self) -> None:
        if self.constant_candidates:
            raise UserError(
                "--eval.constant_candidates", "no constant noise is sought here; run `trimtab eval` for that"
            )
        super().__post_init__()


@dataclass
class LoraConfig(TuningConfig):
    """``trimtab lora``."""

    # Needed with --from_rollouts. With a dataset: where to evaluate before and after.
    env: EnvConfig | None = None
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    # Demonstrations to learn from; LeRobot's own options (--dataset.repo_id=, --dataset.root=).
    dataset: DatasetConfig | None = None
    # Learn from the policy's own successes instead (filtered behaviour cloning).
    from_rollouts: bool = False
    # Environment steps of all rollouts together, spent to the last one.
    env_steps: int = 20_000
    # Rounds of rolling out and fine-tuning; they share these steps.
    rounds: int = 4
    eval: FineTunedEvalConfig = field(default_factory=FineTunedEvalConfig)
    machine: MachineConfig = field(default_factory=MachineConfig)
    # Environments that roll out at the same time.
    num_envs: int = 8
    seed: int = 0
    # Default: outputs/lora/<date>/<time>.
    output_dir: Path | None = None

    def __post_init__(self) -> None:
        self.check()
        check_run(self.seed, self.num_envs)
        at_least(1, self, "--", "rounds")
        if self.env_steps < self.rounds:
            raise UserError("--env_steps", f"must be at least one for each round, got {self.env_steps}")
        if self.from_rollouts and self.dataset is not None:
            raise UserError(
                "--dataset.repo_id", "drop it, or drop --from_rollouts: they are two ways to learn"
            )
        if self.from_rollouts and self.env is None:
            raise UserError("--env.type", "--from_rollouts needs an environment to roll out in")
        if not self.from_rollouts and self.dataset is None:
            raise UserError(
                "--dataset.repo_id", "name a LeRobotDataset to learn from, or add --from_rollouts=true"
            )
        if self.dataset is not None and (self.dataset.streaming or self.dataset.eval_split):
            name = "streaming" if self.dataset.streaming else "eval_split"
            raise UserError(f"--dataset.{name}", "not supported here; `lerobot-train --peft...` is")


def main(config: LoraConfig) -> None:
    output = new_output_dir(config.output_dir, "lora")
    config.machine.apply()
    adapter, folder = open_base(config)
    tuner = FineTuner(adapter, folder, config.policy, config)
    if config.dataset is not None:
        data = tuner.check(config.dataset)
        for line in rate_warning(data, config.env and config.env.fps):
            print(line)
    session = None
    if config.env is not None:
        session = Session(tuner.adapter, config.env, config.eval, config.machine)
        print(describe(session, folder))
    run = Run(config, tuner, session, output)
    print(f"{config.method}: {tuner.trained_parameters:,} weights to train")
    if config.dataset is not None:
        run.from_dataset(config.dataset)
    elif session is not None:
        run.from_rollouts(session)
    run.finish()
    if run.evaluations:
        print(f"\n{table(summaries(run.evaluations))}\n")
    name = "LoRA adapter" if config.method == "lora" else "policy"
    print(f"{name} in {run.saved}; all in {output}")


def open_base(config: LoraConfig) -> tuple[PolicyAdapter, Path]:
    """Load the policy; a ``UserError`` where it cannot be fine-tuned, or rolled out as asked."""
    path = config.policy.path
    if not path:
        raise UserError("--policy.path", "name the folder or Hub repository of the base policy")
    if is_server(path):
        raise UserError("--policy.path", f"{path} is a policy server; its weights are out of reach")
    if is_artefact(path):
        raise UserError("--policy.path", f"{path} is a steered policy; name its base")
    folder = resolve_folder(path, config.policy.revision)
    if is_peft(folder):
        raise UserError("--policy.path", f"{path} is itself a LoRA adapter; name the policy that it adapts")
    if config.env is not None:
        check_base(config.env, folder)
    adapter = load_adapter(config.policy)
    for note in adapter.notes:
        print(f"note: {note}")
    if config.from_rollouts and adapter.remembers:
        raise UserError(
            "--from_rollouts",
            f"a {adapter.policy_type} policy remembers its episode chunk by chunk, which cannot be cut to an "
            "exact number of steps; learn from a dataset",
        )
    return adapter, folder


class Run:
    """One fine-tuning, and what it leaves under ``output``."""

    def __init__(self, config: LoraConfig, tuner: FineTuner, session: Session | None, output: Path) -> None:
        self.config, self.tuner, self.session, self.output = config, tuner, session, output
        self.saved = output / "policy"
        self.evaluations: dict[str, Evaluation] = {}
        self.details: dict[str, Any] = {}
        self.seconds: dict[str, float] = defaultdict(float)

    def from_dataset(self, dataset: DatasetConfig) -> None:
        """Fine-tune on the user's dataset."""
        steps = self.config.steps or DATASET_STEPS
        if self.session is not None:
            self._evaluate(self.session, "base", "base policy")
        with MetricsWriter(self.output / "metrics.jsonl") as metrics:

            def on_step(losses: list[float], seconds: float) -> None:
                step = len(losses)
                if step % LOG_EVERY == 0 or step == steps:
                    loss = means(losses)[-1]
                    metrics({"step": step, "loss": loss, "seconds_total": round(seconds, 3)})

            started = time.perf_counter()
            losses = self.tuner.fit(dataset, steps, self.config.seed, on_step=on_step)
            self.seconds["training"] = time.perf_counter() - started
        self.details = {"losses": means(losses)}
        if self.session is not None:
            self._evaluate(self.session, "fine_tuned", "fine-tuned")

    def from_rollouts(self, session: Session) -> None:
        """Filtered behaviour cloning, the policy evaluated after each round."""
        config = self.config
        last = self._evaluate(session, "base", "base policy")
        require_success(last)
        recorder = Recorder(self.output / "successes", session.env.fps)
        with (
            MetricsWriter(self.output / "metrics.jsonl") as metrics,
            session.environments(config.num_envs, keep_seen=True) as vec,
        ):
            metrics({"round": 0, "env_steps": 0, "eval": last.summary()})
            rollouts = Rollouts(session.runner, vec, session.own_noise, training_seed(config.seed))
            for done in rounds(self.tuner, rollouts, recorder, config.env_steps, config.rounds, config.seed):
                for part, seconds in done.seconds.items():
                    self.seconds[part] += seconds
                total, spent = len(done.episodes), rollouts.env_steps
                line: dict[str, Any] = {
                    "round": done.number,
                    "env_steps": spent,
                    "episodes": total,
                    "successes": done.successes,
                    "success_rate": done.successes / total if total else None,
                    "updates": self.tuner.updates,
                }
                report = f"round {done.number}: {spent} steps, {done.successes}/{total} episodes succeeded"
                if done.losses:
                    label = f"round {done.number}/{config.rounds}: evaluation"
                    last = self._evaluate(session, "fine_tuned", label)
                    line["losses"] = means(done.losses)
                    print(f"{report}; now {rate_text(last.summary())}")
                else:
                    line["skipped"] = True
                    print(f"{report}; skipped, for there is nothing new to learn from")
                metrics(line | {"eval": last.summary()})
        episodes = sum(line["episodes"] for line in metrics.lines[1:])
        if not recorder.episodes:
            raise UserError(
                "--env_steps",
                f"none of {episodes} episodes in {rollouts.env_steps} steps succeeded: nothing to clone; "
                "raise it, or start from a policy that succeeds at times",
            )
        self.details = {
            "env_steps": rollouts.env_steps,
            "training_episodes": episodes,
            "dataset": {"repo_id": REPO_ID, "episodes": recorder.episodes, "frames": recorder.frames},
        }

    def finish(self) -> None:
        """Save the result and write results.json, config.json and videos."""
        config, tuned = self.config, self.tuner.save(self.saved)
        results = results_of(
            config,
            self.evaluations,
            method=config.method,
            from_rollouts=config.from_rollouts,
            updates=self.tuner.updates,
            trained_parameters=self.tuner.trained_parameters,
            saved_bytes=sum(path.stat().st_size for path in self.saved.iterdir()),
            base_sha256=self.tuner.base_hashes["weights"],
            **self.details,
            seconds={name: round(value, 2) for name, value in self.seconds.items()},
        )
        write_json(self.output / "results.json", results)
        again = repeatable(draccus.encode(config, LoraConfig))
        again = {n: value for n, value in again.items() if value is not None and n != "output_dir"}
        write_json(self.output / "config.json", again)
        if self.session is not None:
            after = Session(tuned, self.session.env, config.eval, config.machine)
            after.record(after.own_noise, self.output / "after.mp4", "video: fine-tuned")

    def _evaluate(self, session: Session, name: str, label: str) -> Evaluation:
        started = time.perf_counter()
        with session.evaluation_environments() as vec:
            self.evaluations[name] = session.evaluate(vec, session.own_noise, label=label)
        part = "base_evaluation" if name == "base" else "evaluation"
        self.seconds[part] += time.perf_counter() - started
        return self.evaluations[name]


def means(losses: list[float]) -> list[float]:
    """The loss curve: the mean of every ``LOG_EVERY`` steps."""
    return [mean(losses[start : start + LOG_EVERY]) for start in range(0, len(losses), LOG_EVERY)]
