"""What an environment's config answers for itself, and what holds where it does not.

Nothing outside ``rl/envs`` asks for an environment's type. A LeRobot ``EnvConfig`` may define, as methods:

- ``task_names()``: the tasks that its ``task`` names, each of which it can be narrowed to;
- ``check_base(folder)``: raises a ``UserError`` where the base policy in ``folder`` does not know them;
- ``base_tasks(folder)``: all tasks that this base knows;
- ``for_policy(features)``: the config that hands on what a policy with these input features reads;
- ``make_chunk_env(task_index, **options)``: its chunk-wise form, a ``ChunkEnv`` with its ``options``; the
  index is taken modulo the number of tasks;
- ``attended``, true, and ``make_vector_env(n_obs_steps)``: a robot, whose episodes people start, and how the
  learner sees it (``robot/vector.py``);
- ``tiny``, true: a simulator without cameras, which ``--tiny=true`` may run as it is.

LeRobot's own configs define none of them. ``CHUNK_CONFIGS`` names configs of ours that run in their place.
"""

from dataclasses import fields
from pathlib import Path
from typing import Any

from lerobot.envs.configs import EnvConfig, HILSerlRobotEnvConfig, HubEnvConfig
from lerobot.envs.configs import LiberoEnv as LiberoConfig

from trimtab.adapters.errors import UserError, reason
from trimtab.rl.envs.chunk import ChunkEnv
from trimtab.rl.envs.libero import LiberoChunksConfig

CHUNK_CONFIGS: dict[type[EnvConfig], type[EnvConfig]] = {LiberoConfig: LiberoChunksConfig}
ELSEWHERE = (
    "register an EnvConfig whose create_envs builds it in a package of your own, and name that with "
    "--env.discover_packages_path (example: recipes/configs/openpi_droid/README.md)"
)


def task_names(config: EnvConfig, option: str = "--env.task") -> list[str]:
    """The tasks that ``config`` names; empty where only the environments know, once they are made.

    A ``UserError`` about a task that there is not names ``option``.
    """
    try:
        return getattr(config, "task_names", list)()
    except UserError as error:
        raise UserError(option if error.option == "--env.task" else error.option, error.message) from None


def check_base(config: EnvConfig, base: Path | str) -> None:
    """Refuse tasks that the base policy (its folder or server) does not know, where that can be told."""
    if isinstance(base, Path):
        getattr(config, "check_base", lambda folder: None)(base)


def base_tasks(config: EnvConfig, base: Path | str) -> list[str]:
    """All tasks that the base policy knows; empty where nobody can tell."""
    return getattr(config, "base_tasks", lambda folder: [])(base) if isinstance(base, Path) else []


def for_policy(config: EnvConfig, features: dict[str, tuple[int, ...]]) -> EnvConfig:
    """The config for a policy that reads ``features``: shapes by the environment's names for them."""
    return getattr(config, "for_policy", lambda features: config)(features)


def make_chunk_env(config: EnvConfig, task_index: int, **options: Any) -> ChunkEnv:
    """One environment of ``config``, stepped chunk by chunk; arguments as for the config's own."""
    make = getattr(config, "make_chunk_env", None)
    if make is not None:
        return make(task_index, **options)
    limit = getattr(config, "episode_length", None)
    env, tasks = make_single_env(config, task_index)
    return ChunkEnv(env, limit=limit, tasks=tasks, **options)


def is_attended(config: EnvConfig) -> bool:
    """Whether people start its episodes: nothing moves unasked, and nothing repeats."""
    return getattr(config, "attended", False)


def refuse_attended(config: EnvConfig | None, instead: str) -> None:
    """Raise a UserError for an environment whose episodes people start, where a command runs hundreds."""
    if config is not None and is_attended(config):
        raise UserError(
            "--robot.type", f"people start its episodes, and this command runs hundreds; {instead}"
        )


def tiny_form(options: dict[str, Any], steps: int) -> EnvConfig | None:
    """The environment that ``options`` name, with episodes of ``steps``, if it says that it is ``tiny``."""
    config = EnvConfig.get_known_choices().get(options.get("type"))
    if not getattr(config, "tiny", False):
        return None
    return config(**{"task": options["task"]} if options.get("task") else {}, episode_length=steps)


def env_processors(config: EnvConfig, policy_config: Any) -> tuple[Any, Any]:
    """What stands between an environment and a policy's processors, as ``lerobot-eval`` has it.

    But for X-VLA outside LIBERO: LeRobot gives it there, too, what turns its end-effector poses into LIBERO's
    actions.
    """
    from lerobot.envs.factory import make_env_pre_post_processors

    if getattr(policy_config, "type", None) == "xvla" and not isinstance(config, LiberoConfig):
        return config.get_env_processors()
    return make_env_pre_post_processors(config, policy_config)


def check_buildable(config: EnvConfig) -> None:
    """Raise a UserError for one of LeRobot's configs whose environments its vector factory does not build."""
    if type(config).create_envs is not EnvConfig.create_envs:
        return
    if isinstance(config, HubEnvConfig):
        why = f"'{config.type}' is built by code from the Hub (--env.hub_path), which trimtab does not run"
    elif isinstance(config, HILSerlRobotEnvConfig):
        why = f"'{config.type}' ({config.name}) is LeRobot's HIL-SERL set-up, which only lerobot.rl builds"
    else:
        return
    raise UserError("--env.type", f"{why}; {ELSEWHERE}")


def make_single_env(config: EnvConfig, task_index: int = 0) -> tuple[Any, int]:
    """One bare environment of ``config``, and how many tasks it has: that of ``task_index`` modulo these.

    LeRobot's vector environments reset or freeze a sub-environment on their own, which would lose
    the last observation; the environment inside them does not.
    """
    if form := CHUNK_CONFIGS.get(type(config)):
        config = form(**{field.name: getattr(config, field.name) for field in fields(config) if field.init})
    try:
        suites = config.create_envs(1, False)
    except ImportError as error:
        # LeRobot says that the whole package is missing, where it may be something that it needs.
        cause = f"{reason(error.__cause__)}: " if error.__cause__ else ""
        raise UserError("--env.type", f"'{config.type}' does not run here: {cause}{reason(error)}") from error
    tasks = [vec for by_task in suites.values() for vec in by_task.values()]
    count = len(tasks)
    chosen = tasks.pop(task_index % count)
    for vec in tasks:
        vec.close()
    if not hasattr(chosen, "envs"):
        raise UserError(
            "--env.type",
            f"create_envs of '{config.type}' must give a gymnasium.vector.SyncVectorEnv, it gives a "
            f"{type(chosen).__name__}",
        )
    return chosen.envs[0], count
