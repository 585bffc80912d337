"""What an environment must do, and what happens where it does not: the table in ``rl/README.md``.

Whatever an environment hands over is read here, at every step; ``examine`` asks once for what a single step
cannot show. A broken rule is a warning where a run can still be right, else a ``UserError``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np

from trimtab.adapters.errors import UserError

if TYPE_CHECKING:
    from trimtab.rl.envs.chunk import ChunkEnv

OPTION = "--env.type"
# What success goes by, LeRobot's name first; and what LeRobot reads of an observation.
SUCCESS_KEYS = ("is_success", "success", "succeed")
READ = ("agent_pos", "environment_state", "pixels")
# Shape and dtype of each entry of an observation, nested ones by path.
Layout = dict[str, tuple[tuple[int, ...], np.dtype]]


@dataclass
class Description:
    """What an environment says of itself; nothing has moved for it.

    Attributes:
        instruction, task: what to do in words, and the task's name; empty where there is none.
        repeatable: false where its metadata says that it cannot repeat an episode.
        warnings: about a time limit or a frame rate.
        blank: where it cannot repeat: an observation history of zeros as it declares it, if it does.
    """

    instruction: str
    task: str
    repeatable: bool
    warnings: list[str]
    blank: dict[str, Any] | None


@dataclass
class Findings:
    """What ``examine`` has found.

    Attributes:
        repeatable: two resets with one seed agree, to the bit.
        success_key: the name by which success was reported, if it was.
        warnings: rules that do not hold.
    """

    repeatable: bool
    success_key: str | None = None
    warnings: list[str] = field(default_factory=list)


def read_reset(returned: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The observation, as arrays of its own, and the info that ``reset`` returned.

    Raises:
        UserError: it returned something else.
    """
    if not isinstance(returned, tuple) or len(returned) != 2:
        raise UserError(OPTION, f"reset must return (observation, info); it returns {kind(returned)}")
    observation, info = returned
    if isinstance(info, Mapping) and any(key in info for key in READ) and not _readable(observation):
        raise UserError(OPTION, "reset must return (observation, info); it returns (info, observation)")
    return read_observation(observation), _read_info(info, "reset")


def read_step(returned: Any) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
    """Observation, as arrays of its own, reward, terminated, truncated and info that ``step`` returned.

    Raises:
        UserError: it returned something else.
    """
    if not isinstance(returned, tuple) or len(returned) != 5:
        raise UserError(
            OPTION,
            "step must return (observation, reward, terminated, truncated, info); it returns "
            f"{kind(returned)}",
        )
    observation, reward, terminated, truncated, info = returned
    info = _read_info(info, "step")
    terminated, truncated = read_truth(terminated, "terminated"), read_truth(truncated, "truncated")
    if terminated or truncated:  # one that resets itself at once keeps the last observation here
        kept = [info.get(key) for key in ("final_obs", "final_observation")]
        observation = next((one for one in kept if isinstance(one, Mapping)), observation)
    return read_observation(observation), read_number(reward, "the reward"), terminated, truncated, info


def read_observation(observation: Any) -> dict[str, Any]:
    """An observation as arrays of its own, so that it stays as it is when the environment goes on.

    Numbers become arrays, a single one of shape (1,); text is left out, as LeRobot leaves it out.

    Raises:
        UserError: it is no dict, or holds nothing that LeRobot can read.
    """
    if not isinstance(observation, Mapping):
        raise UserError(
            OPTION,
            "observations must be a dict with agent_pos, environment_state or pixels; the environment gives "
            f"{kind(observation)}: wrap it",
        )
    found = _read_entries(observation)
    if not found:
        raise UserError(
            OPTION,
            "observations must be a dict with agent_pos, environment_state or pixels; the environment gives "
            f"a dict with {', '.join(map(repr, observation)) or 'no entries'}",
        )
    return found


def _read_entries(observation: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in observation.items():
        if isinstance(value, Mapping):
            if entries := _read_entries(value, f"{path}{key}/"):
                found[key] = entries
            continue
        array = np.array(value)
        if array.dtype.kind in "biuf":
            found[key] = array if array.ndim else array.reshape(1)
        elif array.dtype.kind not in "US":
            raise UserError(OPTION, f"the observation's '{path}{key}' must be numbers, it is {kind(value)}")
    return found


def layout(observation: Mapping[str, Any], path: str = "") -> Layout:
    """Shapes and dtypes of an observation that ``read_observation`` has read."""
    found: Layout = {}
    for key, value in observation.items():
        if isinstance(value, dict):
            found |= layout(value, f"{path}{key}/")
        else:
            found[f"{path}{key}"] = value.shape, value.dtype
    return found


def check_images(found: Layout) -> None:
    """Refuse images that LeRobot does not read: it takes uint8 (height, width, channels).

    Raises:
        UserError: names the first that is something else.
    """
    for key, (shape, dtype) in found.items():
        wrong = dtype != np.uint8 or len(shape) != 3 or shape[2] >= min(shape[:2])
        if key.split("/")[0] == "pixels" and wrong:
            raise UserError(
                OPTION,
                f"the image '{key}' must be uint8 of (height, width, channels), it is {dtype} of {shape}",
            )


def check_layout(first: Layout, now: Layout) -> None:
    """Refuse an observation that holds other entries than the first one, or of another shape.

    Raises:
        UserError: names the first difference.
    """
    for key in sorted(first.keys() | now.keys()):
        before, after = first.get(key), now.get(key)
        if before is None or after is None:
            verb = "appears" if before is None else "disappears"
            raise UserError(OPTION, f"every observation must hold the same entries, but '{key}' {verb}")
        if before[0] != after[0]:
            raise UserError(
                OPTION, f"the observation's '{key}' must keep its shape, but {before[0]} becomes {after[0]}"
            )
    check_images(now)


def read_success(info: Mapping[str, Any]) -> tuple[str | None, bool]:
    """The name by which ``info``, or the ``final_info`` in it, reports success, and whether it does.

    Raises:
        UserError: what it says there is neither true nor false.
    """
    for place in (info, info.get("final_info")):
        for key in SUCCESS_KEYS if isinstance(place, Mapping) else ():
            if place.get(key) is not None:
                return key, read_truth(place[key], f"info['{key}']")
    return None, False


def read_truth(value: Any, name: str) -> bool:
    """``value`` as a bool, be it a bool, 0 or 1, of Python or NumPy, or an array of one of them.

    Raises:
        UserError: it is something else.
    """
    if isinstance(value, bool):
        return value
    array = np.asarray(value)
    if array.size == 1 and array.dtype.kind in "biuf" and (truth := array.item()) in (0, 1):
        return bool(truth)
    raise UserError(OPTION, f"{name} must be true or false, the environment gives {kind(value)}")


def read_number(value: Any, name: str) -> float:
    """``value`` as a float, be it a number or an array of one.

    Raises:
        UserError: it is something else.
    """
    array = np.asarray(value)
    if array.size == 1 and array.dtype.kind in "biuf":
        return float(array.item())
    raise UserError(OPTION, f"{name} must be one number, the environment gives {kind(value)}")


def describe(env: ChunkEnv, fps: float | None) -> Description:
    """What ``env`` says of itself, beside the frame rate ``fps`` of its config. It does not move."""
    repeatable = all(_metadata(env.env, "repeatable"))
    warnings = []
    if env.limit is None:
        warnings.append(
            "the environment names no time limit (_max_episode_steps, its spec's, or episode_length in its "
            "config): an episode that it does not end itself goes on for ever"
        )
    shown = next((rate for rate in _metadata(env.env, "render_fps") if isinstance(rate, int | float)), None)
    if fps and shown and round(shown) != round(fps):
        warnings.append(
            f"--env.fps is {fps:g}, its render_fps is {shown:g}; what is recorded here says {fps:g}"
        )
    space = getattr(env.env, "observation_space", None)
    blank = None
    if not repeatable and isinstance(space, gym.spaces.Dict):
        blank = read_observation(gym.vector.utils.create_empty_array(space, env.n_obs_steps, np.zeros))
    task = str(getattr(env.env.unwrapped, "task", "") or "")
    return Description(env.task_description, task, repeatable, warnings, blank)


def _metadata(env: gym.Env, name: str) -> list[Any]:
    """What the metadata of an environment and of those in it say, from outside in."""
    chain = [env]
    while isinstance(chain[-1], gym.Wrapper):
        chain.append(chain[-1].env)
    held = [getattr(one, "metadata", None) for one in (*chain, env.unwrapped)]
    said = [metadata.get(name) for metadata in held if isinstance(metadata, Mapping)]
    return [value for value in said if value is not None]


def examine(env: ChunkEnv, chunk: np.ndarray) -> Findings:
    """Step a chunk (T, action_dim) in an environment that has just been reset, and reset it twice more.

    Raises:
        UserError: a rule without which nothing can be right is broken.
    """
    seed, first, after_reset = env.seed, env.history(), env.layout
    result = env.step_chunk(chunk, None)
    found = Findings(True, result.success_key)
    last = result.final_observation if result.ended else result.observation
    for key, (_, dtype) in layout(last).items():
        if dtype != after_reset[key][1]:
            found.warnings.append(
                f"the observation's '{key}' is {after_reset[key][1]} after a reset and {dtype} after a step"
            )
    space = env.env.action_space
    if isinstance(space, gym.spaces.Box) and np.mean((chunk < space.low) | (chunk > space.high)) > 0.5:
        found.warnings.append(
            f"most of the policy's first actions ({chunk.min():.3g} to {chunk.max():.3g}) are out of the "
            f"environment's bounds ({space.low.min():.3g} to {space.high.max():.3g}): are the units the same?"
        )
    if odd := _differing(first, env.reset(seed)):
        found.repeatable = False
        found.warnings.append(
            f"the environment does not repeat: two resets with seed {seed} differ in {odd}. So policies are "
            "not compared on the same episodes, and --resume=true drops the interrupted ones"
        )
    elif not _differing(first, env.reset(seed + 1)):
        found.warnings.append(
            f"the environment starts the same with the seeds {seed} and {seed + 1}: if it does with all, "
            "episodes differ in their noise only, and results say nothing about other starts"
        )
    return found


def _differing(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """Names of the entries that differ between two observations of one layout."""
    found = []
    for key, value in first.items():
        if isinstance(value, dict):
            same = not _differing(value, second[key])
        else:
            same = np.array_equal(value, second[key])
        found += [] if same else [f"'{key}'"]
    return ", ".join(found)


def _read_info(info: Any, name: str) -> dict[str, Any]:
    if not isinstance(info, Mapping):
        raise UserError(OPTION, f"{name} must return a dict as info, the environment gives {kind(info)}")
    return dict(info)


def _readable(observation: Any) -> bool:
    return not isinstance(observation, Mapping) or any(key in observation for key in READ)


def kind(value: Any) -> str:
    """What a value is, in a few words: for messages."""
    if isinstance(value, tuple):
        return f"{len(value)} values"
    if isinstance(value, Mapping):
        return "a dict"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"a Box of shape {tuple(value.shape)}" if value.ndim else f"{value}"
    text = repr(value)
    return text if len(text) <= 60 else f"a {type(value).__name__}"
