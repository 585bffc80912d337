"""`trimtab probe`: can this policy be steered, and in which noise space?"""

from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lerobot.envs.configs import EnvConfig
from safetensors.torch import save_file
from torch import Tensor

from trimtab.adapters import PolicyAdapter, PolicyConfig, UserError
from trimtab.adapters.engine import use_engine
from trimtab.adapters.errors import at_least, reason
from trimtab.adapters.loading import open_adapter
from trimtab.adapters.steerability import MANY, Steerability, measure
from trimtab.policies.artefact import is_artefact
from trimtab.policies.noise_samplers import base_noise, repeated_noise
from trimtab.recipes.support.console import new_output_dir
from trimtab.recipes.support.diagnosis import as_json, diagnose
from trimtab.recipes.support.reporting import NAMES, plot_probe, summaries, table, write_json
from trimtab.recipes.support.session import Session, base_of, describe
from trimtab.recipes.support.shared_configs import EpisodesConfig, MachineConfig
from trimtab.rl.envs.hooks import check_base, is_attended
from trimtab.rl.evaluation import Evaluation
from trimtab.rl.rollout import Rollout
from trimtab.rl.runs.threads import machine_record
from trimtab.rl.statistics import wilson_interval


@dataclass
class ProbeEvalConfig(EpisodesConfig):
    """How policies are evaluated, with fewer episodes than for a result."""

    n_episodes: int = 50
    constant_candidates: int = 8
    videos: int = 0


@dataclass
class ProbeConfig:
    """``trimtab probe``."""

    policy: PolicyConfig = field(default_factory=PolicyConfig)
    # Without an environment the policy is asked on random inputs within its own statistics, and eval.* and
    # machine.workers have no effect.
    env: EnvConfig | None = None
    eval: ProbeEvalConfig = field(default_factory=ProbeEvalConfig)
    machine: MachineConfig = field(default_factory=MachineConfig)
    # Observations on which the chunks are compared; with an environment, from episodes of the base.
    observations: int = 16
    # Noises per observation.
    noises: int = 16
    # Repeats of each timing (0: no timing).
    repeats: int = 5
    # Seeds the noises and the random inputs.
    seed: int = 0
    # Default: outputs/probe/<date>/<time>.
    output_dir: Path | None = None

    def __post_init__(self) -> None:
        at_least(2, self, "--", "observations", "noises")
        at_least(0, self, "--", "repeats", "seed")


def main(config: ProbeConfig) -> None:
    if is_artefact(config.policy.path):
        raise UserError("--policy.path", f"{config.policy.path} is already steered; name its base policy")
    output = new_output_dir(config.output_dir, "probe")
    config.machine.apply()
    with closing(open_adapter(config.policy)) as adapter:
        use_engine(adapter, config.policy.engine)
        _probe(adapter, config, output)


def _probe(adapter: PolicyAdapter, config: ProbeConfig, output: Path) -> None:
    for note in adapter.notes:
        print(f"note: {note}")
    path, session = str(config.policy.path), None
    if config.env is not None:
        check_base(config.env, base_of(config.policy))
        session = Session(adapter, config.env, config.eval, config.machine)
        print(describe(session, path))
    else:
        steps, width = adapter.chunk_shape
        print(
            f"policy: {path} ({adapter.policy_type}), noise {tuple(adapter.noise_spec.shape)}, "
            f"{steps} actions of {width} per chunk; random inputs (no --env.type)"
        )
    evaluations: dict[str, Evaluation] = {}
    constants: list[dict[str, Any]] = []
    best = None
    try:
        observations, again = _observations(adapter, session, config)
        measured = measure(adapter, observations, config.noises, config.seed, config.repeats, again)
        print(f"\n{describe_measured(measured, adapter)}")
        usable = measured.finite and measured.deterministic and not measured.blind
        if session is not None and usable and not is_attended(session.env):
            evaluations, constants, best = _success(session, config)
    except UserError:
        raise
    except Exception as error:  # whatever a policy raises that ``verify`` has not seen
        what = f"{type(error).__name__}: {reason(error)}"
        raise UserError("--policy.path", f"{path} loads but does not run ({what})") from error
    output.mkdir(parents=True, exist_ok=True)
    success = summaries(evaluations)
    if success:
        print(f"\n{table(success)}")
        session.record({output / "base.mp4": session.own_noise})
    if constants:
        print(describe_constants(constants))
    if best is not None:
        save_file({"noise": best.contiguous()}, str(output / "best_constant.safetensors"))
    diagnosis = diagnose(measured, adapter.policy_type, evaluations, constants)
    title = f"{Path(path).name}: {diagnosis.headline}"
    plot_probe(output / "probe.png", measured, success, constants, title)
    report = {
        "policy": path,
        "policy_type": adapter.policy_type,
        "noise_shape": list(adapter.noise_spec.shape),
        "chunk_shape": list(adapter.chunk_shape),
        "notes": adapter.notes,
        **as_json(measured, diagnosis),
        "success": success,
        "constants": constants,
        "machine": machine_record(),
    }
    write_json(output / "probe.json", report)
    lines = "".join(f"\n  - {line}" for line in diagnosis.lines)
    print(f"\ndiagnosis: {diagnosis.headline}{lines}\n\nall in {output}")


def _observations(
    adapter: PolicyAdapter, session: Session | None, config: ProbeConfig
) -> tuple[list[Any], Any]:
    """Encoded observations, and a function that encodes the first of them again."""
    if session is None:
        generator = torch.Generator().manual_seed(config.seed)
        examples = [adapter.example_observation(1, generator) for _ in range(config.observations)]
        return [adapter.observe(example) for example in examples], lambda: adapter.observe(examples[0])
    runner, first, taken = session.runner, config.eval.seed, 0
    per_episode = -(-config.observations // 4)
    seen: list[Any] = []
    with session.environments(1) as vec:
        tasks = vec.task_descriptions[:1]
        rollout = Rollout(runner, vec, lambda _, episode: first if episode is None else episode + 1)
        while True:  # the base acts, so that later states are there too
            if rollout.waiting and not rollout.start():
                raise UserError("--robot", "stopped before the policy had seen enough")
            seen.append(rollout.observations[0])
            rollout.encode_observations(features=False)
            rollout.begin(session.own_noise)
            result = rollout.receive()[0]
            ended, taken = result.ended, taken + 1
            if result.lost:  # a robot's: maybe it has seen nothing
                seen.pop()
            if len(seen) >= config.observations:
                break
            if ended or taken < per_episode or vec.attended:
                rollout.start_next_episodes()
            else:
                rollout.restart([0])
            taken = 0 if ended else taken % per_episode
    encoded = [runner.encode([observation], tasks) for observation in seen]
    return encoded, lambda: runner.encode(seen[:1], tasks)


def _success(
    session: Session, config: ProbeConfig
) -> tuple[dict[str, Evaluation], list[dict[str, Any]], Tensor | None]:
    """Success under own, repeated, zero and constant noise; of each constant tried; and the best of these."""
    spec, episodes = session.adapter.noise_spec, config.eval.constant_episodes
    others = {"repeated_noise": repeated_noise} if len(spec.shape) == 2 else {}
    if spec.distribution == "zero":  # the base is zero noise already
        others["prior_noise"] = base_noise
    with session.evaluation_environments() as vec:
        found, search, constant = session.baselines(vec, config.seed)
        found |= {name: session.evaluate(vec, noise, label=NAMES[name]) for name, noise in others.items()}
    counts = [round(rate * episodes) for rate in search.get("selection_success", ())]
    constants = [{"successes": n, "episodes": episodes, "ci95": wilson_interval(n, episodes)} for n in counts]
    return {name: found[name] for name in NAMES if name in found}, constants, constant


def describe_measured(measured: Steerability, adapter: PolicyAdapter) -> str:
    """The measurements as a few aligned lines."""
    by_step = measured.spread.square().mean(-1).sqrt()
    live = adapter.noise_spec.size - measured.declared_inert
    lines = {
        "same noise twice": f"chunks differ by {measured.repeat_difference:.3g}",
        "different noises": f"chunks differ by up to {measured.noise_difference:.3g}",
        "spread over noises": f"{by_step[0]:.3g} at the chunk's first step, {by_step[-1]:.3g} at its last "
        "(the policy's units)",
        "noise entries": f"{live} live, {measured.declared_inert} declared inert",
    }
    if measured.declared_inert:
        lines["inert entries anew"] = f"chunks differ by {measured.inert_difference:.3g}"
    names = {"encode": "encode", "denoise_1": "denoise one noise", f"denoise_{MANY}": f"denoise {MANY}"}
    for name, times in measured.seconds.items():
        middle, least, most = (1e3 * seconds for seconds in times)
        lines[names[name]] = f"{middle:.3g} ms (median; {least:.3g} to {most:.3g})"
    return "\n".join(f"{name:<20} {value}" for name, value in lines.items())


def describe_constants(constants: list[dict[str, Any]]) -> str:
    """The success of each constant noise that was tried."""
    tried = ", ".join(f"{c['successes']}/{c['episodes']}" for c in constants)
    intervals = sorted(c["ci95"] for c in constants)
    worst, best = (f"{100 * low:.0f} - {100 * high:.0f} %" for low, high in (intervals[0], intervals[-1]))
    return f"constants tried: {tried}; 95 % interval of the worst {worst}, of the best {best}"
