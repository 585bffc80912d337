"""The kinds of methods that `trimtab compare` knows, and how each learns.

A package that `--env.discover_packages_path` names may add its own to ``KINDS`` and ``METHODS``.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import draccus
from accelerate import Accelerator
from draccus.utils import DecodingError
from lerobot.configs.default import DatasetConfig

from trimtab.adapters import UserError, load_adapter
from trimtab.policies.acting import ChunkPolicy
from trimtab.policies.noise_samplers import zero_noise
from trimtab.policies.noise_space import FullNoiseConfig, NoiseSpaceConfig
from trimtab.recipes.cli.lora import DATASET_STEPS
from trimtab.recipes.compare.config import METHODS
from trimtab.recipes.compare.runs import Method, Run, Task
from trimtab.recipes.finetune.data import Recorder
from trimtab.recipes.finetune.filtered_bc import rounds
from trimtab.recipes.finetune.rollouts import Rollouts
from trimtab.recipes.finetune.training import FineTuner, TuningConfig
from trimtab.recipes.support.option_dicts import Options, merge
from trimtab.rl.algorithms import AlgorithmConfig
from trimtab.rl.algorithms.acting import TrainingResult
from trimtab.rl.algorithms.presets import PAPER
from trimtab.rl.budget import TrainConfig
from trimtab.rl.data.demonstration_data import DemosConfig, read_demonstrations
from trimtab.rl.evaluation import evaluate
from trimtab.rl.runner import PolicyRunner
from trimtab.rl.seeds import training_seed
from trimtab.rl.trainer import Trainer

# Types of a method's parts, where `--settings` may change them.
PARTS = {"rl": AlgorithmConfig, "noise": NoiseSpaceConfig, "train": TrainConfig, "tuning": TuningConfig}


@dataclass(frozen=True)
class Base(Method):
    """The policy as it is."""

    def policy(self, run: Run) -> ChunkPolicy:
        """Who acts."""
        return run.task.session.own_noise

    def learn(self, run: Run) -> dict[str, Any]:
        run.policies = {"policy": self.policy(run)}
        run.add_point(0, 0)
        return {}


@dataclass(frozen=True)
class ZeroNoise(Base):
    """The policy fed no noise."""

    def policy(self, run: Run) -> ChunkPolicy:
        return zero_noise


@dataclass(frozen=True)
class Steering(Method):
    """Settings of `trimtab adapt`."""

    rl: AlgorithmConfig
    noise: NoiseSpaceConfig = field(default_factory=FullNoiseConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    # Training environments, where the method's source says how many.
    num_envs: int | None = None

    uses = ("observe", "env_steps", "grid", "num_envs")

    def settings(self) -> dict[str, Any]:
        found = super().settings()
        # Of its pace what holds; how long it trains and reports is the comparison's own.
        found["train"] = draccus.encode(self.train.at_pace_of(self.rl))
        for name in ("env_steps", "log_every"):
            del found["train"][name]
        return found

    def chunks_before_learning(self) -> int:
        train = self.train.at_pace_of(self.rl)
        return max(train.first_update or 0, train.warmup_transitions or 0)

    def learn(self, run: Run) -> dict[str, Any]:
        task, lines = run.task, []
        rl = self.rl.within(task.config.env_steps, lambda: longest_episode(run))
        runner = PolicyRunner(task.session.adapter, task.session.env)
        reports = {"on_metrics": lines.append, "progress": False}
        with run.training_environments(self.num_envs) as vec:
            if search := rl.make_trainer(runner, vec, self.noise, run.seed, **reports):
                self._take(run, search.run())
                run.add_point(search.env_steps, search.env_steps)
                return {"updates": 0, "search_episodes": search.episodes, "metrics": lines}
            train = replace(self.train, env_steps=task.config.env_steps, log_every=task.config.grid)
            accelerator = Accelerator(cpu=task.session.adapter.device.type == "cpu")
            trainer = Trainer(runner, vec, accelerator, train, rl, self.noise, run.seed, **reports)
            self._take(run, trainer.algorithm)
            trainer.on_step = lambda ended: run.note(
                trainer.env_steps, [(episode.success, episode.steered) for episode in ended]
            )
            trainer.run()
        return {"updates": trainer.updates, "metrics": lines}

    def _take(self, run: Run, learnt: TrainingResult) -> None:
        run.policies, run.trained = learnt.policies(), learnt.trained_parameters()
        run.save = lambda folder, facts: learnt.save(
            folder, run.task.base, self.noise, facts | {"algorithm": self.rl.type}
        )


def longest_episode(run: Run) -> int:
    """Steps of the base's longest episode, of a few."""
    session, seeds = run.task.session, run.task.session.eval.seeds[:8]
    return int(evaluate(session.runner, run.vec, session.own_noise, seeds, progress=False).steps.max())


@dataclass(frozen=True)
class FilteredCloning(Method):
    """The base fine-tuned on its own successes, a round every point of the grid: settings of
    `trimtab lora --from_rollouts`.
    """

    tuning: TuningConfig = field(default_factory=TuningConfig)

    uses = ("env_steps", "grid", "num_envs")
    tunes = True

    def learn(self, run: Run) -> dict[str, Any]:
        task, session = run.task, run.task.session
        tuner = make_tuner(run, self.tuning)
        count = task.config.env_steps // task.config.grid
        with (
            run.training_environments(keep_seen=True) as vec,
            tempfile.TemporaryDirectory(prefix="trimtab-successes-") as folder,
        ):
            runner = PolicyRunner(tuner.adapter, session.env)
            rollouts = Rollouts(runner, vec, session.own_noise, training_seed(run.seed))
            recorder = Recorder(Path(folder) / "successes", session.env.fps)
            shown = sys.stderr.isatty()
            for done in rounds(tuner, rollouts, recorder, task.config.env_steps, count, run.seed, shown):
                run.note(rollouts.env_steps, [(episode.success, True) for episode in done.episodes])
        return {"updates": tuner.updates}


@dataclass(frozen=True)
class Demonstrations(Method):
    """The base fine-tuned on demonstrations: settings of `trimtab lora`. Costs no environment steps."""

    tuning: TuningConfig = field(default_factory=TuningConfig)

    uses = ("dataset",)
    tunes = True

    def learn(self, run: Run) -> dict[str, Any]:
        dataset, count = good_demonstrations(run.task)
        losses = make_tuner(run, self.tuning).fit(
            dataset, self.tuning.steps or DATASET_STEPS, run.seed, run.label
        )
        run.add_point(0, 0)
        return {"demonstrations": count, "updates": len(losses), "loss": losses[-1]}


def make_tuner(run: Run, tuning: TuningConfig) -> FineTuner:
    """A copy of the base to be fine-tuned, which acts in its place."""
    base, session = run.task.base, run.task.session
    tuner = FineTuner(load_adapter(base.options), base.folder, base.options, tuning)
    run.runner = PolicyRunner(tuner.adapter, session.env)
    run.policies, run.trained = {"actor": session.own_noise}, {"actor": tuner.trained_parameters}

    def save(folder: Path, facts: dict[str, Any]) -> Path:
        tuner.save(folder / "policy")
        return folder / "policy"

    run.save = save
    return tuner


def good_demonstrations(task: Task) -> tuple[DatasetConfig, int]:
    """The demonstrations of this task that succeed, and how many they are.

    Raises:
        UserError: there are none.
    """
    named, option = task.dataset, "--dataset.repo_id"
    if named is None:
        raise UserError(option, "'lora' learns from demonstrations; name a LeRobotDataset")
    with task.session.environments(1, 0) as vec:
        description = vec.task_descriptions[0]
    demos = DemosConfig(repo_id=named.repo_id, root=named.root, revision=named.revision)
    data = read_demonstrations(demos, task.session.adapter, "sparse", description)
    index = data.dataset.hf_dataset.with_format("numpy")["episode_index"][:]
    good = [int(index[episode.first]) for episode in data.episodes if episode.succeeded]
    if named.episodes is not None:
        good = [number for number in good if number in named.episodes]
    if not good:
        raise UserError(option, f"no demonstration of '{description}' succeeds: nothing to clone")
    return replace(named, episodes=sorted(good)), len(good)


# By the name that methods.yaml gives a kind.
KINDS: dict[str, type[Method]] = {
    "base": Base,
    "zero_noise": ZeroNoise,
    "steering": Steering,
    "own_successes": FilteredCloning,
    "demonstrations": Demonstrations,
}


def make_method(name: str, changes: Options | None = None) -> Method:
    """The method ``name`` with ``changes`` to its options: ``{"noise": {"type": "repeat"}}``.

    Raises:
        UserError: no such option, or a value that it cannot have.
    """
    options, option = dict(METHODS[name]), f"--settings.{name}"
    kind = KINDS[options.pop("kind", "steering")]
    if options.pop("preset", None):  # --rl.preset=paper
        options = merge(PAPER[options["rl"]["type"]], options)
    options = merge({"noise": {"type": "full"}} if kind is Steering else {}, options)
    known = [one.name for one in fields(kind)]
    found: dict[str, Any] = {}
    for part, values in merge(options, changes or {}).items():
        if part not in known or isinstance(values, dict) != (part in PARTS):
            raise UserError(
                option, f"'{part}' is none of {', '.join(known) or 'anything: it has no settings'}"
            )
        try:
            found[part] = draccus.decode(PARTS[part], values) if part in PARTS else values
        except DecodingError as error:
            if isinstance(error.__cause__, UserError):
                raise error.__cause__ from None
            raise UserError(f"{option}.{part}", str(getattr(error, "message", error))) from None
    return kind(**found)
