"""What an environment says of itself, and what one examination of it finds."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np

from trimtab.rl.envs.chunk import ChunkEnv
from trimtab.rl.envs.contract import flat, layout, read_observation


@dataclass
class Description:
    """What an environment says of itself; nothing has moved for it."""

    instruction: str  # what to do, in words; empty where there are none
    task: str  # its name, likewise
    repeatable: bool  # false where its metadata says that it cannot repeat an episode
    warnings: list[str]
    # Where it cannot repeat: an observation history of zeros as it declares it, if it does.
    blank: dict[str, Any] | None
    tasks: int = 1  # of its config, of which it has one; more only where the config itself cannot name them


@dataclass
class Findings:
    """What ``examine`` has found."""

    repeatable: bool  # two resets with one seed agree, to the bit
    success_key: str | None = None  # by which success was reported
    warnings: list[str] = field(default_factory=list)


def describe(env: ChunkEnv, fps: float | None) -> Description:
    """What ``env`` says of itself, beside the frame rate ``fps`` of its config. It does not move."""
    repeatable, warnings = all(_metadata(env.env, "repeatable")), []
    if env.limit is None:
        warnings.append(
            "the environment names no time limit (_max_episode_steps, its spec's, or episode_length in its "
            "config): an episode that it does not end itself goes on for ever"
        )
    rates = [rate for rate in _metadata(env.env, "render_fps") if isinstance(rate, int | float)]
    if fps and rates and round(rates[0]) != round(fps):
        warnings.append(
            f"--env.fps is {fps:g}, its render_fps is {rates[0]:g}; what is recorded here says {fps:g}"
        )
    space, blank = getattr(env.env, "observation_space", None), None
    if not repeatable and isinstance(space, gym.spaces.Dict):
        blank = read_observation(gym.vector.utils.create_empty_array(space, env.n_obs_steps, np.zeros))
    inner = env.env.unwrapped
    named = (env.env, "task_description"), (inner, "task_description"), (inner, "task")
    said = [getattr(one, name, None) for one, name in named]
    instruction = next((text for text in said if isinstance(text, str) and text), "")  # as in lerobot-eval
    return Description(instruction, str(said[2] or ""), repeatable, warnings, blank, env.tasks)


def _metadata(env: gym.Env, name: str) -> list[Any]:
    """What the metadata of an environment and of those in it say, from outside in."""
    chain = [env]
    while isinstance(chain[-1], gym.Wrapper):
        chain.append(chain[-1].env)
    metadata = [getattr(one, "metadata", None) for one in (*chain, env.unwrapped)]
    return [one[name] for one in metadata if isinstance(one, Mapping) and one.get(name) is not None]


def examine(env: ChunkEnv, chunk: np.ndarray, move: bool = True) -> Findings:
    """Step a chunk (T, action_dim) in an environment that has just been reset, and reset it twice more.

    Without ``move`` nothing moves: only the chunk is looked at.

    Raises:
        UserError: a rule without which nothing can be right is broken.
    """
    env.check_actions(chunk)
    if not move:
        return Findings(repeatable=False)
    seed, first, after_reset = env.seed, env.history(), env.layout
    result = env.step_chunk(chunk)
    findings = Findings(True, result.success_key)
    warn = findings.warnings.append
    for key, (_, dtype) in layout(flat(result.final_observation or result.observation)).items():
        if dtype != after_reset[key][1]:
            warn(f"the observation's '{key}' is {after_reset[key][1]} after a reset and {dtype} after a step")
    space = env.env.action_space
    if isinstance(space, gym.spaces.Box) and np.mean((chunk < space.low) | (chunk > space.high)) > 0.5:
        warn(
            f"most of the policy's first actions ({chunk.min():.3g} to {chunk.max():.3g}) are out of the "
            f"environment's bounds ({space.low.min():.3g} to {space.high.max():.3g}): are the units the same?"
        )
    if odd := _differing(first, env.reset(seed)):
        findings.repeatable = False
        warn(
            f"the environment does not repeat: two resets with seed {seed} differ in {odd}. So policies are "
            "not compared on the same episodes, and --resume=true drops the interrupted ones"
        )
    elif not _differing(first, env.reset(seed + 1)):
        warn(
            f"the environment starts the same with the seeds {seed} and {seed + 1}: if it does with all, "
            "episodes differ in their noise only, and results say nothing about other starts"
        )
    return findings


def _differing(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """Paths of the entries that differ between two observations of one layout."""
    one, other = flat(first), flat(second)
    return ", ".join(f"'{path}'" for path in one if not np.array_equal(one[path], other[path]))
