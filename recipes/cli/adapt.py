"""`trimtab adapt`: steer a LeRobot policy in an environment by noise-space RL."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import draccus
from lerobot.envs.configs import EnvConfig

from trimtab.adapters import PolicyConfig, UserError
from trimtab.adapters.errors import reason
from trimtab.policies.actor import NoiseActor
from trimtab.policies.artefact import is_artefact
from trimtab.policies.noise_space import FullNoiseConfig, NoiseSpace, NoiseSpaceConfig
from trimtab.policies.observe import ObserveConfig
from trimtab.recipes.support.console import new_output_dir
from trimtab.recipes.support.launched import launched_processes, make_accelerator
from trimtab.recipes.support.layers import flatten
from trimtab.recipes.support.repeat import loaded_plugins
from trimtab.recipes.support.reporting import (
    NAMES,
    MetricsWriter,
    outcomes,
    plot_curve,
    rate_text,
    summaries,
    table,
    write_json,
)
from trimtab.recipes.support.run_folder import METRICS, RunFolder, disk_errors
from trimtab.recipes.support.session import Session, describe, open_session
from trimtab.recipes.support.shared_configs import EvalConfig, MachineConfig
from trimtab.recipes.support.trackers import Trackers, check_trackers
from trimtab.rl.algorithms import AlgorithmConfig, BestOfNConfig
from trimtab.rl.algorithms.acting import Learnt, LoadedBase, RunRequest
from trimtab.rl.budget import TrainConfig
from trimtab.rl.data.decoder import ConditioningSpec
from trimtab.rl.data.demonstration_data import DemosConfig, read_demonstrations
from trimtab.rl.data.memory import check_replay, replay_layout
from trimtab.rl.envs.vector import ChunkVectorEnv, WorkerLost
from trimtab.rl.evaluation import Evaluation, pooled
from trimtab.rl.runs.checkpoint import CheckpointConfig, Checkpoints
from trimtab.rl.runs.faults import FaultsConfig, Stopped, StopSignals
from trimtab.rl.runs.processes import World
from trimtab.rl.runs.threads import machine_record
from trimtab.rl.seeds import MAX_SEED
from trimtab.rl.trainer import Trainer
from trimtab.rl.warm_start import begin_at, read_constant


@dataclass
class AdaptConfig:
    """``trimtab adapt``."""

    env: EnvConfig
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    rl: AlgorithmConfig = field(default_factory=BestOfNConfig)
    noise: NoiseSpaceConfig = field(default_factory=FullNoiseConfig)
    observe: ObserveConfig = field(default_factory=ObserveConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    demos: DemosConfig = field(default_factory=DemosConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    machine: MachineConfig = field(default_factory=MachineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    faults: FaultsConfig = field(default_factory=FaultsConfig)
    # Environments that collect experience at the same time, in each process.
    num_envs: int = 8
    seed: int = 0
    # Go on with the run in output_dir from its newest checkpoint.
    resume: bool = False
    # Where metrics also go, by commas: tensorboard, wandb, trackio, ...
    trackers: str | None = None
    # Default: outputs/adapt/<date>/<time>.
    output_dir: Path | None = None

    def __post_init__(self) -> None:
        check_run(self.seed, self.num_envs)
        check_trackers(self.trackers)
        # As config.json keeps it, so that the run is the same under another version's defaults.
        self.train = self.train.at_pace_of(self.rl)


def check_run(seed: int, num_envs: int) -> None:
    """Refuse a number of environments or a seed that a run cannot have."""
    if num_envs < 1:
        raise UserError("--num_envs", f"must be at least 1, got {num_envs}")
    if not 0 <= seed <= MAX_SEED:
        raise UserError("--seed", f"must be between 0 and {MAX_SEED}, got {seed}")


@dataclass
class Outcome:
    """What a steering run found."""

    evaluations: dict[str, Evaluation]
    untrained: Evaluation
    details: dict[str, Any]
    artefact: Path
    lines: list[dict[str, Any]]
    parameters: int
    seconds: dict[str, float]
    by_task: dict[str, dict[str, Evaluation]]


def main(config: AdaptConfig) -> None:
    if is_artefact(config.policy.path):
        raise UserError("--policy.path", f"{config.policy.path} is already steered; name its base policy")
    processes = make_accelerator(config.policy.device) if launched_processes() > 1 else None
    output = config.output_dir if config.resume else new_output_dir(config.output_dir, "adapt")
    if processes:  # the first one's clock names the folder
        output = World(processes).gather(output)[0]
    session, folder = open_session(
        config.policy, config.env, config.eval, config.machine, config.observe, many=True
    )
    say = print if processes is None or processes.is_main_process else lambda text: None
    say(describe(session, folder))
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked != "no":
        say(
            f"accelerate's mixed_precision={asked} changes nothing here: --policy.dtype=bfloat16 is for the "
            "base, --rl.precision=bfloat16 for the learner"
        )
    try:
        outcome = steer(session, folder, config, output)
    except Stopped as stopped:
        at = "after training" if stopped.env_steps is None else f"at {stopped.env_steps:,} environment steps"
        say(
            f"\nstopped by {stopped.name} {at}; go on with: trimtab adapt --resume=true --output_dir={output}"
        )
        return
    say(f"\n{table(summaries(outcome.evaluations), config.train.reward == 'env')}\n")
    for task, found in outcome.by_task.items() if len(outcome.by_task) > 1 else ():
        say(f"{task}: " + "; ".join(f"{NAMES.get(n, n)} {rate_text(e.summary())}" for n, e in found.items()))
    say(untrained_line(outcome.untrained.summary(), config.noise.type))
    for line in waits(outcome.lines):
        say(line)
    say(f"{outcome.parameters:,} weights trained; artefact {outcome.artefact}; all in {output}")


def untrained_line(summary: dict[str, Any], noise: str) -> str:
    """One line about what the noise space alone does."""
    return f"untrained actor ({noise} noise): {rate_text(summary)}"


def waits(lines: list[dict[str, Any]]) -> list[str]:
    """A line about what waited for what while training, from the last of the metrics, if they say."""
    last = lines[-1] if lines else {}
    names = {
        "learner_waits": "the learner waited for the environments {:.0%}",
        "envs_wait": "the environments waited for the learner {:.0%}",
        "denoise": "both waited for the base {:.0%}",
        "processes_wait": "the processes waited for each other {:.0%}",
    }
    shares = {name: last.get(f"seconds_share/{name}") for name in names}
    said = [names[name].format(share) for name, share in shares.items() if share is not None]
    return [f"of {last['seconds_total']:.0f} s of training: " + ", ".join(said)] if said else []


def steer(session: Session, folder: Path | str, config: AdaptConfig, output: Path) -> Outcome:
    """Evaluate the baselines, train the noise actor, evaluate it, and write everything under ``output``.

    With ``config.resume``, what ``output`` holds of it is taken up.

    Raises:
        UserError: from the policy or the environment; nothing is written before training starts.
        Stopped: by a signal, once there is a checkpoint.
    """
    trackers = check_trackers(config.trackers)
    accelerator = make_accelerator(session.adapter.device.type, trackers, output)
    session.world = World(accelerator)
    signals = StopSignals()
    try:
        with signals.installed(), disk_errors(output):
            return _steer(session, folder, config, output, accelerator, signals)
    except WorkerLost as error:
        raise UserError("--env.type", reason(error, last=True)) from error


def _steer(
    session: Session,
    folder: Path | str,
    config: AdaptConfig,
    output: Path,
    accelerator: Any,
    signals: StopSignals,
) -> Outcome:
    space = config.noise.build(session.adapter.noise_spec)
    check_inputs(session, config, space)
    identity = session.adapter.identity(folder)
    run = RunFolder(output, config, identity, config.checkpoint, session.world)
    found = run.newest() if config.resume else None
    if found is not None and not found.beside.get("repeatable", True):
        session.repeatable = False  # as the run has found; it is not asked again, for asking moves it
    clock = time.perf_counter
    seconds: dict[str, float] = {}
    started = clock()
    measured, known = (run.baselines() if config.resume else None) or measure(session, config, space)
    check_reward(config, measured)
    run.begin(measured, known)
    seconds["baselines"] = clock() - started
    started = clock()
    tracked = Trackers(accelerator, check_trackers(config.trackers), "trimtab", flatten(run.config))
    with session.environments(config.num_envs, faults=config.faults) as vec:
        if len(set(vec.task_names)) != len(session.tasks):
            raise UserError("--num_envs", f"{len(session.tasks)} tasks need as many environments or more")
        trainer = make_trainer(session, vec, accelerator, config, run.checkpoints, signals)
        keep = found.beside["metrics"] if found else 0
        with writer(output, keep, session.world) as lines:
            trainer.on_metrics = lambda line: (lines(line), tracked(line))
            if run.checkpoints:
                run.checkpoints.beside = lambda: {"metrics": lines.offset(), "repeatable": vec.repeatable}
            for note in trainer.resume(found) if found else ():
                print(note)
            signals.kept = found is not None
            signals.deferred = run.checkpoints is not None and config.rl.replays
            learnt = trainer.run()
            signals.kept, signals.deferred = signals.deferred, False
            if signals():
                raise Stopped(signals.name)
    tracked.close()
    learnt.actor.eval()
    seconds["steering"] = clock() - started
    started = clock()
    steered = learnt.deployed_policy(config.eval.deterministic)
    for task, vec in session.evaluations_by_task():
        measured[task]["steered"] = session.evaluate(vec, steered, label="steered")
    seconds["steered_evaluation"] = clock() - started
    session.adapter.check_identity(identity, folder)
    untrained = pooled([held.pop("untrained") for held in measured.values()])
    names = next(iter(measured.values()))
    evaluations = {name: pooled([held[name] for held in measured.values()]) for name in names}
    parameters = learnt.trained_parameters()["actor"]
    outcome = Outcome(evaluations, untrained, known, output, lines.lines, parameters, seconds, measured)
    if session.world.main:
        started = clock()
        outcome.artefact = save(session, folder, config, output, trainer, learnt, outcome)
        write_results(output, outcome, config, trainer, identity)
        run.write_config()
        title = f"{config.rl.type} on {config.env.task or config.env.type}, {config.noise.type} noise"
        plot_curve(output / "curve.png", lines.lines, summaries(evaluations), title)
        session.record(session.own_noise, output / "before.mp4", "video: base policy")
        session.record(steered, output / "after.mp4", "video: steered")
        seconds["pictures"] = clock() - started
        write_results(output, outcome, config, trainer, identity)  # once more, with the last time in it
    return outcome


def measure(
    session: Session, config: AdaptConfig, space: NoiseSpace
) -> tuple[dict[str, dict[str, Evaluation]], dict[str, Any]]:
    """Evaluate the baselines, and what the noise space itself does to the policy before any learning.

    Returns:
        (evaluations by task and name, details of the search for a constant)
    """
    found: dict[str, dict[str, Evaluation]] = {}
    details: dict[str, Any] = {}
    for task, vec in session.evaluations_by_task():
        if not found and config.rl.replays:
            announce_memory(session, config, space)
        found[task], said, _ = session.baselines(vec, config.seed)
        untrained = config.rl.untrained(space)
        found[task]["untrained"] = (
            session.evaluate(vec, untrained, label="untrained actor") if untrained else found[task]["base"]
        )
        details[task] = said
    return found, next(iter(details.values())) if len(details) == 1 else details


def check_reward(config: AdaptConfig, measured: dict[str, dict[str, Evaluation]]) -> None:
    """Refuse to learn from success where the environment reports none.

    Args:
        config: of the run.
        measured: the baselines, by task and policy.

    Raises:
        UserError: names what the environment's ``info`` holds instead.
    """
    problem = config.rl.without_success(config.train.reward)
    for task, found in measured.items():
        base = found["base"]
        if base.reported or problem is None:
            continue
        episodes = sum(len(one.seeds) for one in found.values())
        option, mend = problem
        raise UserError(
            option,
            f"the environment never reported success in {episodes} episodes of {task} (its info held: "
            f"{', '.join(base.info_keys) or 'nothing'}), so there is nothing to learn from; {mend}",
        )


def announce_memory(session: Session, config: AdaptConfig, space: NoiseSpace) -> None:
    """Say what the replay will take, or refuse it, before the long work, once an observation is known."""
    if session.first is None:
        return
    keeps = "conditioning" in config.rl.replayed
    spec = ConditioningSpec.of(session.adapter, session.first) if keeps else None
    feature_dim = session.runner.features(session.first).shape[1]
    layout = replay_layout(config.rl, session.adapter, space, feature_dim, spec)
    line = check_replay(config.train.replay_capacity, **layout)
    if session.world is None or session.world.main:
        print(line)


def writer(output: Path, keep: int, world: World) -> MetricsWriter:
    """Where the lines of metrics go: on the main process, the run's file."""
    return MetricsWriter(output / METRICS if world.main else Path(os.devnull), keep if world.main else 0)


def save(
    session: Session,
    folder: Path | str,
    config: AdaptConfig,
    output: Path,
    trainer: Any,
    learnt: Learnt,
    outcome: Outcome,
) -> Path:
    """Write what is deployed; returns its folder."""
    training = {
        "env": draccus.encode(config.env, EnvConfig),
        "seed": config.seed,
        "env_steps": trainer.env_steps,
        "episodes": trainer.episodes,
        "deterministic": config.eval.deterministic,
        "success": {name: entry for name, entry in summaries(outcome.evaluations).items()},
        "algorithm": config.rl.type,
        "plugins": loaded_plugins(),
    }
    base = LoadedBase(session.adapter, config.policy, folder)
    return learnt.save(output, base, config.noise, training)


def check_inputs(session: Session, config: AdaptConfig, space: NoiseSpace) -> None:
    """Refuse what does not fit together before any long work.

    Raises:
        UserError: the algorithm cannot learn in this noise space or from demonstrations, or the dataset or
            the warm start is not there or does not fit the policy.
    """
    processes = session.world.size if session.world else 1
    warm_start = config.train.warm_start
    config.rl.check(space, RunRequest(len(session.tasks), processes, config.resume, bool(warm_start)))
    config.demos.check(config.rl)
    if len(session.tasks) > 1:
        if config.demos.enabled:
            raise UserError("--env.task", "demonstrations are of one task; name one")
        if config.num_envs < len(session.tasks):
            raise UserError("--num_envs", f"{len(session.tasks)} tasks need as many environments or more")
    if config.demos.enabled:
        read_demonstrations(config.demos, session.adapter, config.train.reward, config.env.task or "")
    if warm_start:
        noise = read_constant(warm_start, session.adapter.noise_spec)
        begin_at(NoiseActor(1, space, config.rl.actor), noise)


def make_trainer(
    session: Session,
    vec: ChunkVectorEnv,
    accelerator: Any,
    config: AdaptConfig,
    checkpoints: Checkpoints | None = None,
    signals: StopSignals | None = None,
) -> Any:
    """What runs ``config.rl``: a ``Trainer``, or the algorithm's own."""
    return config.rl.own_run(session.runner, vec, config.noise, config.seed) or Trainer(
        session.runner,
        vec,
        accelerator,
        config.train,
        config.rl,
        config.noise,
        config.seed,
        demos=config.demos,
        checkpoints=checkpoints,
        faults_config=config.faults,
        stop=signals or StopSignals(),
    )


def write_results(
    output: Path,
    outcome: Outcome,
    config: AdaptConfig,
    trainer: Any,
    identity: dict[str, Any],
) -> None:
    """Write results.json: the table and how it came about."""
    write_json(
        output / "results.json",
        {
            "policies": summaries(outcome.evaluations),
            "tasks": {task: summaries(found) for task, found in outcome.by_task.items()},
            "outcomes": outcomes(outcome.evaluations),
            "untrained_actor": outcome.untrained.summary(),
            "constant_noise_search": outcome.details,
            "env": {"type": config.env.type, "task": config.env.task},
            "seed": config.seed,
            "evaluation_seeds": [config.eval.seeds[0], config.eval.seeds[-1]],
            "env_steps": trainer.env_steps,
            "training_episodes": trainer.episodes,
            "updates": trainer.updates,
            "actor_parameters": outcome.parameters,
            "base_sha256": identity.get("sha256"),  # a policy server shows no weights
            "seconds": {name: round(value, 2) for name, value in outcome.seconds.items()},
            "machine": machine_record(),
            "train": asdict(config.train),
        },
    )
