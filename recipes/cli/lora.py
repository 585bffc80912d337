"""`trimtab lora`: fine-tune a LeRobot policy instead of steering it, on a dataset or on its own successes."""

import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import draccus
from lerobot.configs.default import DatasetConfig
from lerobot.envs.configs import EnvConfig

from trimtab.adapters import PolicyConfig, UserError
from trimtab.recipes.cli.adapt import check_run
from trimtab.recipes.finetune.data import REPO_ID, Recorder
from trimtab.recipes.finetune.rollouts import Rollouts, rounds
from trimtab.recipes.finetune.training import FineTuner, TuningConfig, means
from trimtab.recipes.support.console import new_output_dir
from trimtab.recipes.support.option_dicts import repeatable
from trimtab.recipes.support.reporting import MetricsWriter, rate_text, results_of, table, write_json
from trimtab.recipes.support.session import Session, describe
from trimtab.recipes.support.shared_configs import EpisodesConfig, MachineConfig
from trimtab.rl.data.demonstration_data import failures_note, rate_warning
from trimtab.rl.envs.hooks import check_base, refuse_attended
from trimtab.rl.evaluation import Evaluation, require_success
from trimtab.rl.seeds import training_seed


@dataclass
class FineTunedEvalConfig(EpisodesConfig):
    """How the base and the fine-tuned policy are evaluated."""

    # Not searched here; `trimtab eval` on the result does.
    constant_candidates: int = 0


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
        super().__post_init__()
        check_run(self.seed, self.num_envs)
        named, option = self.dataset is not None, "--dataset.repo_id"
        if self.rounds < 1:
            raise UserError("--rounds", f"must be at least 1, got {self.rounds}")
        if self.env_steps < self.rounds:
            raise UserError("--env_steps", f"must be at least one for each round, got {self.env_steps}")
        if self.from_rollouts and named:
            raise UserError(option, "drop it, or drop --from_rollouts: they are two ways to learn")
        if not self.from_rollouts and not named:
            raise UserError(option, "name a LeRobotDataset to learn from, or add --from_rollouts=true")
        if self.from_rollouts and self.env is None:
            raise UserError("--env.type", "--from_rollouts needs an environment to roll out in")
        for name in ("streaming", "eval_split"):
            if getattr(self.dataset, name, False):
                raise UserError(f"--dataset.{name}", "not supported here; `lerobot-train --peft...` is")
        if self.eval.constant_candidates:
            raise UserError(
                "--eval.constant_candidates", "no constant noise is sought here; run `trimtab eval` for that"
            )


def main(config: LoraConfig) -> None:
    refuse_attended(config.env, "learn from --dataset.repo_id= without a robot, then `trimtab eval`")
    output = new_output_dir(config.output_dir, "lora")
    config.machine.apply()
    tuner, session = FineTuner(config.policy, config), None
    for note in tuner.adapter.notes:
        print(f"note: {note}")
    if config.from_rollouts and tuner.adapter.remembers:
        raise UserError(
            "--from_rollouts",
            f"a {tuner.adapter.policy_type} policy remembers its episode chunk by chunk, which cannot be cut "
            "to an exact number of steps; learn from a dataset",
        )
    opened = None
    if config.dataset is not None:
        opened = tuner.check(config.dataset)
        for line in (*rate_warning(opened, config.env and config.env.fps), *failures_note(opened)):
            print(line)
    if config.env is not None:
        check_base(config.env, tuner.folder)
        session = Session(tuner.adapter, config.env, config.eval, config.machine)
        print(describe(session, tuner.folder))
    print(f"{config.method}: {tuner.trained_parameters:,} weights to train")
    run = Run(config, tuner, session, output)
    if session is not None:
        base = run.evaluate("base", "base policy")
        if config.from_rollouts:
            require_success(base)
    with MetricsWriter(output / "metrics.jsonl") as metrics:
        details = run.from_rollouts(metrics) if config.from_rollouts else run.from_dataset(opened, metrics)
    tuned = tuner.save(output / "policy")
    results = results_of(
        config,
        run.evaluations,
        method=config.method,
        from_rollouts=config.from_rollouts,
        updates=tuner.updates,
        trained_parameters=tuner.trained_parameters,
        saved_bytes=sum(path.stat().st_size for path in (output / "policy").iterdir()),
        base_sha256=tuner.base_sha256,
        **details,
        seconds={name: round(value, 2) for name, value in run.seconds.items()},
    )
    write_json(output / "results.json", results)
    write_json(output / "config.json", repeatable(draccus.encode(config, LoraConfig)))
    if session is not None:
        after = Session(tuned, session.env, config.eval, config.machine)
        after.record({output / "after.mp4": after.own_noise})
        print(f"\n{table(results['policies'])}\n")
    kind = "LoRA adapter" if config.method == "lora" else "policy"
    print(f"{kind} in {output / 'policy'}; all in {output}")


@dataclass
class Run:
    """One fine-tuning; ``from_dataset`` and ``from_rollouts`` return what results.json holds of it."""

    config: LoraConfig
    tuner: FineTuner
    session: Session | None
    output: Path
    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def from_dataset(self, opened: Any, metrics: MetricsWriter) -> dict[str, Any]:
        """Fine-tune on the user's dataset, ``opened``."""
        dataset, seed = self.config.dataset, self.config.seed
        losses = self.tuner.fit(dataset, seed, on_metrics=metrics, opened=opened)
        self.seconds["training"] = metrics.lines[-1]["seconds_total"]
        if self.session is not None:
            self.evaluate("fine_tuned", "fine-tuned")
        return {"losses": means(losses)}

    def from_rollouts(self, metrics: MetricsWriter) -> dict[str, Any]:
        """Filtered behaviour cloning, the policy evaluated after each round."""
        config, session, last = self.config, self.session, self.evaluations["base"]
        metrics({"round": 0, "env_steps": 0, "eval": last.summary()})
        recorder = Recorder(self.output / "successes", session.env.fps)
        with session.environments(config.num_envs, keep_seen=True) as vec:
            rollouts = Rollouts(session.runner, vec, session.own_noise, training_seed(config.seed))
            for done in rounds(self.tuner, rollouts, recorder, config.env_steps, config.rounds, config.seed):
                for part, seconds in done.seconds.items():
                    self.seconds[part] += seconds
                report = "skipped, for there is nothing new to learn from"
                if done.losses:
                    last = self.evaluate("fine_tuned", f"round {done.number}/{config.rounds}: evaluation")
                    report = f"now {rate_text(last.summary())}"
                steps, won, total = rollouts.env_steps, done.successes, len(done.episodes)
                print(f"round {done.number}: {steps} steps, {won}/{total} episodes succeeded; {report}")
                line: dict[str, Any] = {
                    "round": done.number,
                    "env_steps": steps,
                    "episodes": total,
                    "successes": won,
                    "success_rate": won / total if total else None,
                    "updates": self.tuner.updates,
                    **({"losses": means(done.losses)} if done.losses else {"skipped": True}),
                }
                metrics(line | {"eval": last.summary()})
        lines = metrics.lines[1:]
        episodes = sum(line["episodes"] for line in lines)
        if not recorder.episodes:
            raise UserError(
                "--env_steps",
                f"none of {episodes} episodes in {steps} steps succeeded: nothing to clone; raise it, or "
                "start from a policy that succeeds at times",
            )
        return {
            "env_steps": steps,
            "training_episodes": episodes,
            "dataset": {"repo_id": REPO_ID, "episodes": recorder.episodes, "frames": recorder.frames},
            "rounds": lines,
        }

    def evaluate(self, name: str, label: str) -> Evaluation:
        started = time.perf_counter()
        with self.session.evaluation_environments() as vec:
            self.evaluations[name] = self.session.evaluate(vec, self.session.own_noise, label=label)
        self.seconds["base_evaluation" if name == "base" else "evaluation"] += time.perf_counter() - started
        return self.evaluations[name]
