"""What an environment hands over, read and checked at every step: the table in ``rl/README.md``.

Where something does not hold, each function here raises a ``UserError`` that says what must. ``examine.py``
asks once for what a single step cannot show.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from trimtab.adapters.errors import UserError

# What success goes by, LeRobot's name first; and what LeRobot reads of an observation.
SUCCESS_KEYS = ("is_success", "success", "succeed")
# Where an environment that resets itself at once keeps the observation that ended the episode.
FINAL_OBSERVATIONS = ("final_obs", "final_observation")
READ = ("agent_pos", "environment_state", "pixels")
# Shape and dtype of each entry of an observation, nested ones by path.
Layout = dict[str, tuple[tuple[int, ...], np.dtype]]


def _broken(message: str) -> UserError:
    return UserError("--env.type", message)


def unpack_reset(returned: Any) -> tuple[Any, dict[str, Any]]:
    """The observation and the info that ``reset`` returned."""
    if not isinstance(returned, tuple) or len(returned) != 2:
        raise _broken(f"reset must return (observation, info); it returns {kind(returned)}")
    return returned[0], _read_info(returned[1], "reset")


def unpack_step(returned: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
    """Observation, reward, terminated, truncated and info that ``step`` returned."""
    if not isinstance(returned, tuple) or len(returned) != 5:
        wanted = "(observation, reward, terminated, truncated, info)"
        raise _broken(f"step must return {wanted}; it returns {kind(returned)}")
    return *returned[:4], _read_info(returned[4], "step")


def read_reset(returned: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The observation, as arrays of its own, and the info that ``reset`` returned."""
    observation, info = unpack_reset(returned)
    if _readable(info) and isinstance(observation, Mapping) and not _readable(observation):
        raise _broken("reset must return (observation, info); it returns (info, observation)")
    return read_observation(observation), info


def read_step(returned: Any) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
    """Observation, as arrays of its own, reward, terminated, truncated and info that ``step`` returned."""
    observation, reward, terminated, truncated, info = unpack_step(returned)
    terminated, truncated = read_truth(terminated, "terminated"), read_truth(truncated, "truncated")
    if terminated or truncated:  # one that resets itself at once keeps the last observation here
        last = [info.get(key) for key in FINAL_OBSERVATIONS]
        observation = next((one for one in last if isinstance(one, Mapping)), observation)
    number = _number(reward)
    if number is None:
        raise _broken(f"the reward must be one number, the environment gives {kind(reward)}")
    return read_observation(observation), number, terminated, truncated, info


def read_observation(observation: Any) -> dict[str, Any]:
    """An observation as arrays of its own, so that it stays as it is when the environment goes on.

    Numbers become arrays, a single one of shape (1,); text is left out, as LeRobot leaves it out.
    """
    entries = _read_entries(observation) if isinstance(observation, Mapping) else None
    if entries:
        return entries
    given = f"{kind(observation)}: wrap it, or run it as --env.type=gym"
    if entries is not None:
        given = f"a dict with {', '.join(map(repr, observation)) or 'no entries'}"
    wanted = "a dict with agent_pos, environment_state or pixels"
    raise _broken(f"observations must be {wanted}; the environment gives {given}")


def _read_entries(observation: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for key, value in observation.items():
        if isinstance(value, Mapping):
            if nested := _read_entries(value, f"{path}{key}/"):
                entries[key] = nested
            continue
        array = np.array(value)
        if array.dtype.kind in "biuf":
            entries[key] = array if array.ndim else array.reshape(1)
        elif array.dtype.kind not in "US":
            raise _broken(f"the observation's '{path}{key}' must be numbers, it is {kind(value)}")
    return entries


def flat(observation: Mapping[str, Any], path: str = "") -> dict[str, np.ndarray]:
    """The arrays of an observation that ``read_observation`` has read, nested ones by path."""
    arrays: dict[str, np.ndarray] = {}
    for key, value in observation.items():
        arrays |= flat(value, f"{path}{key}/") if isinstance(value, dict) else {f"{path}{key}": value}
    return arrays


def layout(arrays: Mapping[str, np.ndarray]) -> Layout:
    """Shapes and dtypes of the arrays that ``flat`` gives."""
    return {path: (array.shape, array.dtype) for path, array in arrays.items()}


def check_layout(first: Layout, now: Layout) -> None:
    """Refuse other entries or shapes than the first observation's, and images that LeRobot cannot read."""
    for key in sorted(first.keys() ^ now.keys()):
        verb = "disappears" if key in first else "appears"
        raise _broken(f"every observation must hold the same entries, but '{key}' {verb}")
    for key, (shape, dtype) in now.items():
        before = first[key][0]
        if shape != before:
            raise _broken(f"the observation's '{key}' must keep its shape, but {before} becomes {shape}")
        wrong = dtype != np.uint8 or len(shape) != 3 or shape[2] >= min(shape[:2])
        if key.split("/")[0] == "pixels" and wrong:
            wanted = "uint8 of (height, width, channels)"
            raise _broken(f"the image '{key}' must be {wanted}, it is {dtype} of {shape}")


def read_success(info: Mapping[str, Any]) -> tuple[str | None, bool]:
    """The name by which ``info``, or the ``final_info`` in it, reports success, and whether it does."""
    for reported in (info, info.get("final_info")):
        for key in SUCCESS_KEYS if isinstance(reported, Mapping) else ():
            if isinstance(reported.get(key), Mapping):
                held = ", ".join(map(str, reported[key]))
                mend = f"--env.type=gym --env.success=info.{key}.NAME takes one of them"
                raise _broken(f"info['{key}'] must be true or false, it is a dict with {held}; {mend}")
            if reported.get(key) is not None:
                return key, read_truth(reported[key], f"info['{key}']")
    return None, False


def read_truth(value: Any, name: str) -> bool:
    """``value`` as a bool, be it a bool, 0 or 1, of Python or NumPy, or an array of one of them."""
    number = _number(value)
    if number not in (0, 1):
        raise _broken(f"{name} must be true or false, the environment gives {kind(value)}")
    return bool(number)


def _number(value: Any) -> float | None:
    """``value`` as a float, be it a number or an array of one; ``None`` if it is neither."""
    array = np.asarray(value)
    return float(array.item()) if array.size == 1 and array.dtype.kind in "biuf" else None


def _read_info(info: Any, name: str) -> dict[str, Any]:
    if not isinstance(info, Mapping):
        raise _broken(f"{name} must return a dict as info, the environment gives {kind(info)}")
    return dict(info)


def _readable(entries: Any) -> bool:
    return isinstance(entries, Mapping) and any(key in entries for key in READ)


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
