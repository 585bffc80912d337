"""The kinds of methods that `trimtab compare` knows, and how each learns.

A package that `--env.discover_packages_path` names may add its own to ``KINDS`` and ``METHODS``.
"""

import tempfile
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import draccus
from accelerate import Accelerator
from draccus.utils import ParsingError
from lerobot.configs.default import DatasetConfig

from trimtab.adapters import UserError
from trimtab.policies.noise_samplers import zero_noise
from trimtab.policies.noise_space import FullNoiseConfig, NoiseSpaceConfig
from trimtab.recipes.compare.config import METHODS
from trimtab.recipes.compare.runs import Method, Run
from trimtab.recipes.finetune.data import Recorder
from trimtab.recipes.finetune.rollouts import Rollouts, rounds
from trimtab.recipes.finetune.training import FineTuner, TuningConfig
from trimtab.recipes.support.group_defaults import with_defaults
from trimtab.recipes.support.option_dicts import Options, merge
from trimtab.rl.algorithms import AlgorithmConfig
from trimtab.rl.algorithms.acting import TrainingResult
from trimtab.rl.algorithms.presets import PAPER
from trimtab.rl.budget import TrainConfig
from trimtab.rl.data.demonstration_data import DemosConfig, read_demonstrations
from trimtab.rl.evaluation import Evaluation, evaluate
from trimtab.rl.runner import PolicyRunner
from trimtab.rl.runs.processes import ProcessGroup
from trimtab.rl.seeds import training_seed
from trimtab.rl.trainer import Trainer


@dataclass(frozen=True)
class Base(Method):
    """The policy as it is."""

    zero: ClassVar[bool] = False

    def learn(self, run: Run) -> dict[str, Any]:
        run.policies = {"policy": zero_noise if self.zero else run.session.own_noise}
        run.add_point(0, 0)
        return {}


@dataclass(frozen=True)
class ZeroNoise(Base):
    """The policy fed no noise."""

    zero = True


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

    def needs_success(self) -> bool:
        return self.train.gate.enabled or self.rl.without_success(self.train.reward) is not None

    def learn(self, run: Run) -> dict[str, Any]:
        lines: list[dict[str, Any]] = []
        adapter, config = run.session.adapter, run.config
        rl = self.rl.within(config.env_steps, lambda: int(base_episodes(run).steps.max()))
        runner = PolicyRunner(adapter, run.session.env)
        reports: dict[str, Any] = {"on_metrics": lines.append, "progress": False}
        with run.session.environments(self.num_envs or config.num_envs) as vec:
            if search := rl.make_trainer(runner, vec, self.noise, run.seed, **reports):
                self._take(run, search.run())
                run.add_point(search.env_steps, search.env_steps)
                return {"updates": 0, "search_episodes": search.episodes, "metrics": lines}
            train = replace(self.train, env_steps=config.env_steps, log_every=config.grid)
            if train.reward == "env":
                train = train.within_rewards(base_episodes(run).reward_range)
            accelerator = Accelerator(cpu=adapter.device.type == "cpu")
            reports["checkpoints"], earlier = run.checkpoints(ProcessGroup(accelerator), lines)
            trainer = Trainer(runner, vec, accelerator, train, rl, self.noise, run.seed, **reports)
            self._take(run, trainer.algorithm)
            trainer.on_step = lambda ended: run.note(
                trainer.env_steps, [(episode.success, episode.steered) for episode in ended]
            )
            for note in trainer.resume(earlier) if earlier is not None else ():
                print(note)
            self._take(run, trainer.run())
        return {"updates": trainer.updates, "metrics": lines, "reward_range": train.reward_range}

    def _take(self, run: Run, learnt: TrainingResult) -> None:
        run.policies, run.trained = learnt.policies(), learnt.trained_parameters()
        run.save = lambda folder, facts: learnt.save(
            folder, run.base, self.noise, facts | {"algorithm": self.rl.type}
        )


def base_episodes(run: Run) -> Evaluation:
    """A few of the base."""
    session, seeds = run.session, run.session.eval.seeds[:8]
    return evaluate(session.runner, run.vec, session.own_noise, seeds, progress=False)


@dataclass(frozen=True)
class FineTuning(Method):
    """A copy of the base is fine-tuned, and acts in its place."""

    tuning: TuningConfig = field(default_factory=TuningConfig)

    tunes = True

    def tuner(self, run: Run) -> FineTuner:
        """Who trains the copy."""
        tuner = FineTuner(run.base.options, self.tuning)
        run.runner = PolicyRunner(tuner.adapter, run.session.env)
        run.policies, run.trained = {"actor": run.session.own_noise}, {"actor": tuner.trained_parameters}
        run.save = lambda folder, facts: tuner.save(folder / "policy")
        return tuner


@dataclass(frozen=True)
class FilteredCloning(FineTuning):
    """`trimtab lora --from_rollouts`: on its own successes, a round every point of the grid."""

    uses = ("env_steps", "grid", "num_envs")

    def learn(self, run: Run) -> dict[str, Any]:
        session, config, tuner = run.session, run.config, self.tuner(run)
        with (
            session.environments(config.num_envs, keep_seen=True) as vec,
            tempfile.TemporaryDirectory(prefix="trimtab-successes-") as folder,
        ):
            rollouts = Rollouts(run.runner, vec, session.own_noise, training_seed(run.seed))
            recorder = Recorder(Path(folder) / "successes", session.env.fps)
            count = config.env_steps // config.grid
            for done in rounds(tuner, rollouts, recorder, config.env_steps, count, run.seed):
                run.note(rollouts.env_steps, [(episode.success, True) for episode in done.episodes])
        return {"updates": tuner.updates}


@dataclass(frozen=True)
class Demonstrations(FineTuning):
    """`trimtab lora` on demonstrations. Costs no environment steps."""

    uses = ("dataset",)

    def learn(self, run: Run) -> dict[str, Any]:
        dataset, count = good_demonstrations(run)
        losses = self.tuner(run).fit(dataset, run.seed, run.label)
        run.add_point(0, 0)
        return {"demonstrations": count, "updates": len(losses), "loss": losses[-1]}


def good_demonstrations(run: Run) -> tuple[DatasetConfig, int]:
    """The demonstrations of this task that succeed, and how many they are.

    Raises:
        UserError: there are none.
    """
    named, description = run.dataset, run.vec.task_descriptions[0]
    demos = DemosConfig(repo_id=named.repo_id, root=named.root, revision=named.revision)
    data = read_demonstrations(demos, run.session.adapter, "sparse", description)
    index = data.dataset.hf_dataset.with_format("numpy")["episode_index"][:]
    good = [int(index[episode.first]) for episode in data.episodes if episode.succeeded]
    if named.episodes is not None:
        good = [number for number in good if number in named.episodes]
    if not good:
        raise UserError(
            "--dataset.repo_id", f"no demonstration of '{description}' succeeds: nothing to clone"
        )
    return replace(named, episodes=sorted(good)), len(good)


# Of --train, what no method has for itself.
OF_COMPARISON = {"env_steps": "--env_steps", "episodes": "--env_steps", "log_every": "--grid"}
# By the name that methods.yaml gives a kind.
KINDS: dict[str, type[Method]] = {
    "base": Base,
    "zero_noise": ZeroNoise,
    "steering": Steering,
    "own_successes": FilteredCloning,
    "demonstrations": Demonstrations,
}


def make_method(name: str, changes: Options | None = None, reward: str = "sparse") -> Method:
    """The method ``name``, which learns from ``reward`` if from any, with ``changes`` to its options.

    ``changes`` are such as ``{"noise": {"type": "repeat"}}``.

    Raises:
        UserError: no such option, or a value that it cannot have.
    """
    options, option = dict(METHODS[name]), f"--settings.{name}"
    kind: Any = KINDS[options.pop("kind", "steering")]
    if options.pop("preset", None):  # --rl.preset=paper
        options = merge(PAPER[options["rl"]["type"]], options)
    if kind is Steering:
        options = merge({"noise": {"type": "full"}}, merge(options, {"train": {"reward": reward}}))
    known = [one.name for one in fields(kind)]
    if not isinstance(changes or {}, dict):
        raise UserError(option, f"is a group of options such as {{rl: {{gamma: 0.9}}}}, got {changes}")
    for part in changes or {}:
        if part not in known:
            raise UserError(
                option, f"'{part}' is none of {', '.join(known) or 'anything: it has no settings'}"
            )
    if said := {*((changes or {}).get("train") or {})} & OF_COMPARISON.keys():
        name = min(said)
        raise UserError(
            f"{option}.train.{name}", f"is the comparison's: {OF_COMPARISON[name]}, for all alike"
        )
    try:
        return draccus.decode(kind, with_defaults(kind, merge(options, changes or {})))
    except ParsingError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        where = getattr(error, "key_path", ())
        raise UserError(".".join((option, *where)), str(getattr(error, "message", error))) from None
