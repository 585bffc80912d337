"""`trimtab adapt`: steer a LeRobot policy in an environment by noise-space RL."""

import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import draccus
from draccus.utils import flatten
from lerobot.envs.configs import EnvConfig

from trimtab.adapters import PolicyConfig, UserError
from trimtab.policies.actor import NoiseActor
from trimtab.policies.artefact import is_artefact
from trimtab.policies.noise_space import FullNoiseConfig, NoiseSpace, NoiseSpaceConfig
from trimtab.policies.observe import ObserveConfig
from trimtab.recipes.support.console import new_output_dir, own_cores, say
from trimtab.recipes.support.launched import (
    Trackers,
    check_trackers,
    launched_processes,
    make_accelerator,
)
from trimtab.recipes.support.option_dicts import loaded_plugins
from trimtab.recipes.support.reporting import (
    NAMES,
    MetricsWriter,
    doubt,
    plot_curve,
    rate_text,
    results_of,
    summaries,
    table,
    waits,
    write_json,
)
from trimtab.recipes.support.robot_dataset import DatasetKeeper, write_dataset
from trimtab.recipes.support.run_folder import METRICS, Hold, RunFolder, run_errors
from trimtab.recipes.support.session import Session, describe, open_session
from trimtab.recipes.support.shared_configs import EvalConfig, MachineConfig
from trimtab.rl.algorithms import AlgorithmConfig, BestOfNConfig
from trimtab.rl.algorithms.acting import LoadedBase, RunRequest
from trimtab.rl.budget import TrainConfig
from trimtab.rl.data.decoder import ConditioningSpec
from trimtab.rl.data.demonstration_data import DemonstrationData, DemosConfig, read_demonstrations
from trimtab.rl.data.memory import check_replay, replay_layout
from trimtab.rl.envs.hooks import is_attended
from trimtab.rl.envs.robot.episodes import EPISODES
from trimtab.rl.envs.robot.outcomes import MEASURED_ON, robot_outcomes
from trimtab.rl.evaluation import Evaluation, pooled, unreported
from trimtab.rl.runs.checkpoint import CheckpointConfig
from trimtab.rl.runs.faults import FaultsConfig, Stopped, StopSignals
from trimtab.rl.runs.processes import ProcessGroup
from trimtab.rl.seeds import MAX_SEED
from trimtab.rl.trainer import Trainer
from trimtab.rl.warm_start import read_constant

# Evaluations by task and policy.
Measured = dict[str, dict[str, Evaluation]]


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
    # Episodes of a robot, as `trimtab adapt --robot.type=` leaves them in `episodes`: learn from these alone.
    from_episodes: Path | None = None
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


def main(config: AdaptConfig) -> None:
    if is_artefact(config.policy.path):
        raise UserError("--policy.path", f"{config.policy.path} is already steered; name its base policy")
    processes = make_accelerator(config.policy.device) if launched_processes() > 1 else None
    output = config.output_dir if config.resume else new_output_dir(config.output_dir, "adapt")
    if processes:  # the first one's clock names the folder
        output = ProcessGroup(processes).gather(output)[0]
    session, folder = open_session(
        config.policy, config.env, config.eval, config.machine, observe=config.observe, many=True
    )
    say(describe(session, folder))
    if config.from_episodes:  # once the policy is known to load
        config.demos.root = str(write_dataset(config.from_episodes, config.env, output))
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked != "no":
        say(
            f"accelerate's mixed_precision={asked} changes nothing here: --policy.dtype=bfloat16 is for the "
            "base, --rl.precision=bfloat16 for the learner"
        )
    try:
        results, lines, artefact = steer(session, folder, config, output)
    except Stopped as stopped:
        at = "after training" if stopped.env_steps is None else f"at {stopped.env_steps:,} environment steps"
        return say(
            f"\nstopped by {stopped.name} {at}; go on with: trimtab adapt --resume=true --output_dir={output}"
        )
    if results["policies"]:
        say(f"\n{table(results['policies'], config.train.reward == 'env')}\n{doubt(results['policies'])}")
    for task, found in results["tasks"].items() if len(results["tasks"]) > 1 else ():
        say(f"{task}: " + "; ".join(f"{NAMES.get(n, n)} {rate_text(one)}" for n, one in found.items()))
    if results["untrained_actor"]:
        say(untrained_line(results, config.noise.type))
    simulators = "rendering" if session.adapter.cameras() else "simulation"
    takes, most = "" if is_attended(config.env) else simulators, min(own_cores(), config.num_envs)
    for line in waits(lines[-1], takes, session.workers, most) if lines else ():
        say(line)
    say(f"{results['actor_parameters']:,} weights trained; artefact {artefact}; all in {output}")


def untrained_line(results: dict[str, Any], noise: str) -> str:
    """What the noise space alone does."""
    return f"untrained actor ({noise} noise): {rate_text(results['untrained_actor'])}"


def steer(
    session: Session, folder: Path | str, config: AdaptConfig, output: Path
) -> tuple[dict[str, Any], list[dict[str, Any]], Path]:
    """Evaluate the baselines, train, evaluate what was learnt, and write everything under ``output``.

    The base was loaded from ``folder``. With ``config.resume``, what ``output`` holds of the run is taken up.

    Returns:
        what results.json holds, the lines of metrics, and the folder of what is deployed

    Raises:
        UserError: from the policy or the environment; nothing is written before training starts.
        Stopped: by a signal, once there is a checkpoint.
    """
    accelerator = make_accelerator(session.adapter.device.type, check_trackers(config.trackers), output)
    session.world = world = ProcessGroup(accelerator)
    with StopSignals().installed() as signals, run_errors(output), Hold(output, world) as hold:
        space, clock = config.noise.build(session.adapter.noise_spec), Clock()
        shown = check_inputs(session, config, space)
        identity = session.adapter.identity(folder)
        run = RunFolder(output, config, identity, world)
        if config.resume:
            hold.take()
        checkpoint = run.newest() if config.resume else None
        if checkpoint is not None and not checkpoint.beside.get("repeatable", True):
            session.repeatable = False  # as the run has found; it is not asked again, for asking moves it
        robot = is_attended(config.env)
        if robot and world.size > 1:
            mend = "leave accelerate launch out"
            raise UserError("--env.type", f"'{config.env.type}' is for one process; {mend}")
        before = run.baselines() if config.resume else None
        if before is None or not (before[0] or robot):  # a robot's base is measured in the run
            before = ({}, {}) if robot else measure(session, config, space)
        measured, constants = before
        check_reward(config.rl, config.train.reward, measured, config.train.gate.enabled)
        if checkpoint is None:
            seen = [found["base"].reward_range for found in measured.values()]
            steps = session.adapter.chunk_shape[0]
            config.train = config.train.within_rewards(*seen, shown and shown.reward_range(steps))
        elif rewards := checkpoint.beside["reward_range"]:  # what was learnt is in their units
            config.train.reward_range = rewards[0], rewards[1]
        clock.lap("baselines")
        tracked = Trackers(accelerator, flatten(run.config))
        kept = checkpoint.beside["metrics"] if checkpoint else 0
        with (
            DatasetKeeper(config.env, output) as dataset,
            session.environments(config.num_envs, faults=config.faults) as vec,
        ):
            hold.take()
            run.begin(measured, constants)
            if robot:
                vec.keep(output / EPISODES, checkpoint.beside["episodes"] if checkpoint else 0)
                vec.stopping, vec.written = signals, dataset.written
            if len(set(vec.task_names)) != len(session.tasks):
                raise UserError("--num_envs", f"{len(session.tasks)} tasks need as many environments or more")
            trainer = config.rl.make_trainer(session.runner, vec, config.noise, config.seed) or Trainer(
                session.runner,
                vec,
                accelerator,
                config.train,
                config.rl,
                config.noise,
                config.seed,
                demos=config.demos,
                checkpoints=run.checkpoints,
                faults_config=config.faults,
                stop=signals,
            )
            with MetricsWriter(output / METRICS if world.main else Path(os.devnull), kept) as metrics:
                trainer.on_metrics = lambda line: (metrics(line), tracked(line))
                if run.checkpoints:
                    run.checkpoints.beside = lambda: {
                        "metrics": metrics.offset(),
                        "reward_range": config.train.reward_range,
                        "repeatable": vec.repeatable or vec.empty,  # where nothing ran, none has been asked
                        "episodes": vec.episodes if robot else None,
                    }
                for note in trainer.resume(checkpoint) if checkpoint else ():
                    print(note)
                signals.kept = checkpoint is not None
                signals.deferred = trainer.checkpoints is not None
                learnt = trainer.run()
                signals.kept, signals.deferred = signals.deferred, False
                if signals():
                    raise Stopped(signals.name)
        tracked.close()
        learnt.actor.eval()
        clock.lap("steering")
        steered = learnt.deployed_policy(config.eval.deterministic)
        if robot:
            measured = {session.tasks[0]: robot_outcomes(output / EPISODES)}
        for task, vec in () if robot else session.evaluations_by_task():
            measured[task]["steered"] = session.evaluate(vec, steered, label="steered")
        clock.lap("steered_evaluation")
        session.adapter.check_identity(identity, folder)
        untrained = [found.pop("untrained") for found in measured.values() if "untrained" in found]
        names = next(iter(measured.values()))
        evaluations = {name: pooled([found[name] for found in measured.values()]) for name in names}
        results = results_of(
            config,
            evaluations,
            tasks={task: summaries(found) for task, found in measured.items()},
            untrained_actor=pooled(untrained).summary() if untrained else None,
            constant_noise_search=constants,
            env_steps=trainer.env_steps,
            training_episodes=trainer.episodes,
            updates=trainer.updates,
            actor_parameters=learnt.trained_parameters()["actor"],
            base_sha256=identity.get("sha256"),  # a policy server shows no weights
            seconds=clock,
            train=asdict(config.train),
        )
        artefact = Path()
        if world.main:
            facts = {
                "env": draccus.encode(config.env, EnvConfig),
                "seed": config.seed,
                "env_steps": trainer.env_steps,
                "episodes": trainer.episodes,
                "deterministic": config.eval.deterministic,
                "success": results["policies"],
                "measured_on": MEASURED_ON if robot else None,
                "attended": robot,
                "algorithm": config.rl.type,
                "plugins": loaded_plugins(),
            }
            base = LoadedBase(session.adapter, config.policy, folder)
            artefact = learnt.save(output, base, config.noise, facts)
            write_json(output / "results.json", results)
            title = f"{config.rl.type} on {config.env.task or config.env.type}, {config.noise.type} noise"
            plot_curve(output / "curve.png", metrics.lines, results["policies"], title)
            session.record({output / "before.mp4": session.own_noise, output / "after.mp4": steered})
            clock.lap("pictures")
            write_json(output / "results.json", results)  # once more, with the last time in it
        return results, metrics.lines, artefact


def check_inputs(session: Session, config: AdaptConfig, space: NoiseSpace) -> DemonstrationData | None:
    """Refuse what does not fit together before any long work; returns the demonstrations, if any."""
    tasks, demos, warm_start = len(session.tasks), config.demos, config.train.warm_start
    asked = config.resume, bool(warm_start), session.adapter.inverts, is_attended(config.env)
    run = RunRequest(tasks, session.world.size, *asked)
    config.rl.check(space, run)
    demos.check(config.rl)
    config.train.check_enough()
    if config.train.offline_updates and not demos.enabled:
        raise UserError("--train.offline_updates", "learns from demonstrations: give --demos.root=FOLDER")
    if tasks > 1 and demos.enabled:
        raise UserError("--env.task", "demonstrations are of one task; name one")
    if config.num_envs < tasks:
        raise UserError("--num_envs", f"{tasks} tasks need as many environments or more")
    if warm_start:
        NoiseActor(1, space, config.rl.actor).begin_at(read_constant(warm_start, session.adapter.noise_spec))
    if not demos.enabled:
        return None
    return read_demonstrations(demos, session.adapter, config.train.reward, config.env.task or "")


def measure(session: Session, config: AdaptConfig, space: NoiseSpace) -> tuple[Measured, dict[str, Any]]:
    """Evaluate the baselines, and what the noise space itself does to the policy before any learning.

    Returns the evaluations, and details of the search for a constant.
    """
    found: Measured = {}
    details: dict[str, Any] = {}
    for task, vec in session.evaluations_by_task():
        if not found and config.rl.pace and (first := session.first) is not None:
            spec = (
                ConditioningSpec.of(session.adapter, first) if "conditioning" in config.rl.replayed else None
            )
            width = session.runner.features(first).shape[1]
            layout = replay_layout(config.rl, session.adapter, space, width, spec)
            say(check_replay(config.train.replay_capacity, layout))  # refuses what does not fit
        found[task], details[task], _ = session.baselines(vec, config.seed)
        untrained = config.rl.untrained(space)
        seeds = session.eval.baseline_seeds
        drawn = session.evaluate(vec, untrained, "untrained actor", seeds) if untrained else None
        found[task]["untrained"] = drawn or found[task]["base"]
    return found, next(iter(details.values())) if len(details) == 1 else details


def check_reward(rl: AlgorithmConfig, reward: str, measured: Measured, gated: bool = False) -> None:
    """Refuse to learn from success, or to hand over by it, where the environment reports none."""
    problem = rl.without_success(reward)
    if gated and problem is None:
        problem = "--train.gate.enabled", "leave it out"
    for found in measured.values() if problem else ():
        if not found["base"].reported:
            option, mend = problem
            raise UserError(option, f"{unreported(found['base'])}, so there is nothing to learn from; {mend}")


class Clock(dict[str, float]):
    """Seconds by part of a run."""

    def __init__(self) -> None:
        self._started = time.perf_counter()

    def lap(self, name: str) -> None:
        """The part that ends now was ``name``."""
        now = time.perf_counter()
        self[name], self._started = round(now - self._started, 2), now
