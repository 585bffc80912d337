"""``--env.type=gym``: any environment that Gymnasium can make, or that a function of yours returns.

LeRobot reads ``agent_pos``, ``environment_state`` and ``pixels`` of an observation. Here a Box or a dict with
names of its own is handed on under these names, as the policy's input features ask for them. Success is what
``success`` says it is.
"""

import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig
from lerobot.utils.constants import ACTION, OBS_ENV_STATE, OBS_IMAGE, OBS_IMAGES, OBS_STATE, OBS_STR

from trimtab.adapters.errors import UserError, reason
from trimtab.rl.envs.chunk import time_limit, vector_envs
from trimtab.rl.envs.contract import (
    FINAL_OBSERVATIONS,
    SUCCESS_KEYS,
    flat,
    kind,
    unpack_reset,
    unpack_step,
)
from trimtab.rl.envs.one_task import OneTaskConfig
from trimtab.rl.rendering import choose_gl_backend

BOX = "observation"  # the name of an observation that is a single array
# By LeRobot's feature: where its commands look for it in an environment's observation.
RAW_NAMES = {OBS_STATE: "agent_pos", OBS_ENV_STATE: "environment_state", OBS_IMAGE: "pixels"}


@EnvConfig.register_subclass("gym")
@dataclass
class GymConfig(OneTaskConfig):
    """Any Gymnasium environment: a registered ``id``, or a ``factory`` of yours."""

    # Its name in results, by default its id or factory; and the instruction of a policy that reads one.
    task: str | None = None
    # As gymnasium.make takes it: Hopper-v5, or my_package:Name-v0, which imports my_package first.
    id: str = ""
    # MODULE:FUNCTION that returns an environment. The module may lie in the current folder.
    factory: str = ""
    # Keyword arguments of either.
    kwargs: dict[str, Any] = field(default_factory=dict)
    # Names of the policy's features for entries of the observation, as '{"cam": "observation.images.top"}'.
    # Several entries of one feature are joined; a single array is called "observation".
    rename_map: dict[str, str] = field(default_factory=dict)
    # What success is: info.NAME, reward>=NUMBER, terminated, or none: compare returns. By default what the
    # environment says in its info.
    success: str = ""
    # Time limit in steps; by default the environment's own.
    episode_length: int | None = None

    def __post_init__(self) -> None:
        if bool(self.id) == bool(self.factory):
            found = "both" if self.id else "neither"
            raise UserError("--env.id", f"name an --env.id or an --env.factory; this names {found}")
        if self.episode_length is not None and self.episode_length < 1:
            raise UserError("--env.episode_length", f"must be at least 1 step, got {self.episode_length}")
        success_rule(self.success)
        self.task = self.task or self.id or self.factory

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        return self.kwargs

    def create_envs(
        self, n_envs: int, use_async_envs: bool = False
    ) -> dict[str, dict[int, gym.vector.VectorEnv]]:
        suites = vector_envs(self.type, [partial(make_env, self)], n_envs, use_async_envs)
        space: Any = suites[self.type][0].single_action_space
        self.features = {ACTION: PolicyFeature(FeatureType.ACTION, space.shape)}  # LeRobot asks for it next
        self.features_map = {ACTION: ACTION}
        return suites


def make_env(config: GymConfig) -> gym.Env:
    """The environment of ``config``, with LeRobot's names, within its bounds, with a time limit.

    Raises:
        UserError: it cannot be made, or is none that a policy could act in.
    """
    choose_gl_backend()
    name, option = config.factory or config.id, "--env.factory" if config.factory else "--env.id"
    if not sys.path or sys.path[0] not in ("", str(Path.cwd())):
        sys.path.insert(0, str(Path.cwd()))  # a command's path holds its own folder, not the current one
    try:
        env = _call_factory(config) if config.factory else _make_registered(config)
    except UserError:
        raise
    except ModuleNotFoundError as error:
        missing = str(error.name).partition(".")[0]
        mend = f"install it (uv pip install {missing.replace('_', '-')}) or put it into the current folder"
        raise UserError(
            option, f"'{name}' needs the package '{missing}', which is not here: {mend}"
        ) from error
    except gym.error.UnregisteredEnv as error:
        mend = f"if a package of its own registers it, name both: --env.id=PACKAGE:{name}"
        raise UserError(option, f"{reason(error)} {mend}") from error
    except Exception as error:  # whatever a simulator raises when it is built
        raise UserError(option, f"'{name}' cannot be made: {reason(error)}") from error
    if not isinstance(env, gym.Env):
        one = "; return one: there are --num_envs of it" if isinstance(env, gym.vector.VectorEnv) else ""
        raise UserError(option, f"'{name}' must return a gymnasium.Env, it returns {kind(env)}{one}")
    if not isinstance(env.action_space, gym.spaces.Box) or len(env.action_space.shape) != 1:
        raise UserError(
            "--env.type", f"policies make vectors of numbers, the environment takes {env.action_space}"
        )
    own, asked = time_limit(env), config.episode_length
    if own and asked and own < asked:
        raise UserError(
            "--env.episode_length", f"is {asked}, the environment ends an episode after {own} steps"
        )
    if asked:
        env = gym.wrappers.TimeLimit(env, asked)
    elif own is None:
        raise UserError(
            "--env.episode_length", "this environment has no time limit: say how many steps an episode takes"
        )
    return LeRobotNames(env, config)


def _make_registered(config: GymConfig) -> gym.Env:
    module, colon, name = config.id.rpartition(":")
    if colon:
        importlib.import_module(module)
    spec = gym.spec(name)
    options: dict[str, Any] = {"max_episode_steps": config.episode_length} if config.episode_length else {}
    if isinstance(spec.entry_point, str):
        creator = gym.envs.registration.load_env_creator(spec.entry_point)
        if "rgb_array" in getattr(creator, "metadata", {}).get("render_modes", ()):
            options["render_mode"] = "rgb_array"
    return gym.make(spec, disable_env_checker=True, **options | config.kwargs)


def _call_factory(config: GymConfig) -> Any:
    module, colon, name = config.factory.partition(":")
    if not (module and colon and name):
        raise UserError("--env.factory", f"must be MODULE:FUNCTION, got '{config.factory}'")
    return getattr(importlib.import_module(module), name)(**config.kwargs)


class LeRobotNames(gym.Wrapper):
    """An environment whose observations have LeRobot's names and whose info says ``is_success``.

    Actions are clipped to its bounds.
    """

    def __init__(self, env: gym.Env, config: GymConfig) -> None:
        super().__init__(env)
        spaces = _entries(env.observation_space)
        self._sources = match(spaces, config)
        self._succeeded = success_rule(config.success)
        self._actions: Any = env.action_space  # asked once: OGBench builds it anew, a fifth of a step's time
        # LeRobot asks for it, and an asynchronous vector environment ends where there is none.
        said = [config.task, *(getattr(env.unwrapped, name, "") for name in ("task_description", "task"))]
        if config.task in (config.id, config.factory):
            del said[0]
        self.task_description = next((text for text in said if text and isinstance(text, str)), "")
        self.observation_space = _nested(
            {
                feature: spaces[paths[0]] if len(paths) == 1 else _joined([spaces[path] for path in paths])
                for feature, paths in self._sources.items()
            },
            gym.spaces.Dict,
        )

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        observation, info = unpack_reset(self.env.reset(seed=seed, options=options))
        return self._renamed(observation), self._without_success(info)

    def step(self, action: np.ndarray) -> tuple[dict, Any, bool, bool, dict]:
        space = self._actions
        action = np.clip(action, space.low, space.high)
        if np.issubdtype(space.dtype, np.integer):
            action = np.rint(action)
        returned = self.env.step(action.astype(space.dtype))
        observation, reward, terminated, truncated, info = unpack_step(returned)
        success = self._succeeded(reward, terminated, info) if self._succeeded else None
        info = self._without_success(info) | ({} if success is None else {"is_success": success})
        for key in FINAL_OBSERVATIONS:
            if info.get(key) is not None:
                info[key] = self._renamed(info[key])
        return self._renamed(observation), reward, terminated, truncated, info

    def _without_success(self, info: Mapping[str, Any]) -> dict[str, Any]:
        """The info without the environment's own word on success, where a rule takes its place."""
        replaced = (*SUCCESS_KEYS, "final_info") if self._succeeded else ()
        return {key: value for key, value in info.items() if key not in replaced}

    def _renamed(self, observation: Any) -> dict[str, Any]:
        arrays = flat(observation) if isinstance(observation, Mapping) else {BOX: observation}
        renamed = {}
        for feature, paths in self._sources.items():
            try:
                parts = [np.asarray(arrays[path]) for path in paths]
            except KeyError as error:
                raise UserError("--env.type", f"an observation lacks {error}, which its space has") from None
            renamed[feature] = parts[0] if len(parts) == 1 else np.concatenate([p.ravel() for p in parts])
        return _nested(renamed, dict)


def match(spaces: Mapping[str, gym.Space], config: GymConfig) -> dict[str, list[str]]:
    """By feature, the entries of an observation that make it.

    What ``rename_map`` does not name goes by its own name. A feature of the policy that is then missing gets
    the one entry of its shape that has no other use, if no other missing feature could take it.

    Raises:
        UserError: ``rename_map`` names an entry that there is not, or cameras that LeRobot would not read; or
            two entries have one feature's name.
    """
    unknown = sorted(config.rename_map.keys() - spaces.keys())
    if unknown:
        raise UserError(
            "--env.rename_map",
            f"names {', '.join(unknown)}; the environment gives {', '.join(spaces) or 'nothing'}",
        )
    sources: dict[str, list[str]] = {}
    for path, feature in config.rename_map.items():
        sources.setdefault(feature, []).append(path)
    spare = [path for path in spaces if path not in config.rename_map]
    alone = spare == [BOX]  # a single array may serve several features
    if config.wanted is None and alone and not _is_image(spaces[BOX]):
        return {OBS_STATE: [BOX], OBS_ENV_STATE: [BOX]} | sources  # LeRobot's commands may ask for either
    by_name = {path: _feature(path, spaces[path]) for path in spare}
    for path, feature in by_name.items():
        if feature in (config.wanted or {}) and feature not in sources:
            same = [one for one in spare if by_name[one] == feature]
            if len(same) > 1:
                raise UserError("--env.rename_map", f"say which of {', '.join(same)} is {feature}")
            sources[feature] = [path]
    missing = {name: shape for name, shape in (config.wanted or {}).items() if name not in sources}
    left = spare if alone else [path for path in spare if [path] not in sources.values()]
    for feature, shape in missing.items():
        fits = [path for path in left if _fits(spaces[path], shape)]
        if len(fits) == 1 and (alone or sum(_fits(spaces[fits[0]], one) for one in missing.values()) == 1):
            sources[feature] = fits
    for path in spare:  # the policy does not read it, or a message names it
        if [path] not in sources.values() and not (_is_image(spaces[path]) and OBS_IMAGE in sources):
            sources.setdefault(by_name[path], [path])
    cameras = [name for name in sources if name.startswith(f"{OBS_IMAGES}.")]
    if OBS_IMAGE in sources and cameras:
        raise UserError(
            "--env.rename_map",
            f"gives {OBS_IMAGE} and {cameras[0]}: LeRobot reads either one camera or several",
        )
    return sources


def _feature(path: str, space: gym.Space) -> str:
    """LeRobot's name for an entry that has one of its own."""
    name = path.removeprefix(f"{OBS_STR}.").replace("/", ".")
    if path == BOX or name in ("state", "agent_pos"):
        return OBS_IMAGE if _is_image(space) and path == BOX else OBS_STATE
    if name == "environment_state":
        return OBS_ENV_STATE
    if _is_image(space):
        name = name.removeprefix("pixels").removeprefix("images").removeprefix(".")
        return f"{OBS_IMAGES}.{name}" if name not in ("", "image") else OBS_IMAGE
    return f"{OBS_STR}.{name}"


def _is_image(space: gym.Space) -> bool:
    return space.dtype == np.uint8 and len(space.shape or ()) == 3


def _fits(space: gym.Space, shape: tuple[int, ...]) -> bool:
    return _is_image(space) if len(shape) == 3 else (space.shape or (1,)) == shape


def _entries(space: gym.Space, path: str = "") -> dict[str, gym.Space]:
    """The spaces of an observation's arrays by path; text is left out."""
    if isinstance(space, gym.spaces.Dict):
        inner = ((f"{path}/{key}" if path else key, one) for key, one in space.items())
        return {p: s for where, one in inner for p, s in _entries(one, where).items()}
    if isinstance(space, gym.spaces.Text):
        return {}
    if not isinstance(
        space, gym.spaces.Box | gym.spaces.Discrete | gym.spaces.MultiBinary | gym.spaces.MultiDiscrete
    ):
        raise UserError("--env.type", f"observations must be arrays or a dict of them, '{path}' is {space}")
    return {path or BOX: space}


def _joined(spaces: list[gym.Space]) -> gym.Space:
    """The space of several entries as one vector."""
    size = sum(int(np.prod(one.shape or 1)) for one in spaces)
    dtype = np.result_type(np.float32, *(one.dtype for one in spaces))
    return gym.spaces.Box(-np.inf, np.inf, (size,), dtype)


def _nested(features: Mapping[str, Any], make: Callable[[dict[str, Any]], Any]) -> Any:
    """Entries by LeRobot's feature as an observation in which LeRobot finds them."""
    cameras = {
        name.removeprefix(f"{OBS_IMAGES}."): entry
        for name, entry in features.items()
        if name.startswith(f"{OBS_IMAGES}.")
    }
    raw = {
        RAW_NAMES.get(name, name.removeprefix(f"{OBS_STR}.")): entry
        for name, entry in features.items()
        if not name.startswith(f"{OBS_IMAGES}.")
    }
    return make(raw | ({"pixels": make(cameras)} if cameras else {}))


def success_rule(text: str) -> Callable[[Any, Any, Mapping[str, Any]], Any] | None:
    """What tells from reward, terminated and info whether a step succeeds; it may say ``None``: not told.

    Returns ``None`` where the environment's own word counts.

    Raises:
        UserError: no such rule.
    """
    if text in ("", "none", "terminated"):
        rules = {"none": lambda reward, terminated, info: None, "terminated": lambda r, ended, info: ended}
        return rules.get(text)
    if text.startswith("info.") and text != "info.":
        return lambda reward, terminated, info: _look_up(info, text.removeprefix("info.").split("."))
    head, _, number = text.replace(" ", "").partition(">=")
    try:
        least = float(number)
    except ValueError:
        least = np.nan
    if head != "reward" or not np.isfinite(least):
        raise UserError(
            "--env.success", f"must be info.NAME, reward>=NUMBER, terminated or none, got '{text}'"
        )
    return lambda reward, terminated, info: bool(np.all(np.asarray(reward) >= least))


def _look_up(info: Any, path: list[str]) -> Any:
    for start in (info, info.get("final_info")):
        for key in path:
            start = start.get(key) if isinstance(start, Mapping) else None
        if start is not None:
            return start
    return None
