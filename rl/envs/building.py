"""One bare environment of a LeRobot ``EnvConfig``, or a line that says why there is none."""

from __future__ import annotations

from typing import Any

from lerobot.envs.configs import EnvConfig, HILSerlRobotEnvConfig, HubEnvConfig

from trimtab.adapters.errors import UserError, reason
from trimtab.rl.envs.libero import chunked


def check_buildable(config: EnvConfig) -> None:
    """Refuse LeRobot's configs whose environments LeRobot's vector factory does not build.

    Raises:
        UserError: says what to do instead.
    """
    if type(config).create_envs is not EnvConfig.create_envs:
        return
    instead = (
        "register an EnvConfig whose create_envs builds it in a package of your own, and name that with "
        "--env.discover_packages_path (example: recipes/configs/openpi_droid/README.md)"
    )
    if isinstance(config, HubEnvConfig):
        raise UserError(
            "--env.type",
            f"'{config.type}' is built by code from the Hub (--env.hub_path), which trimtab does not run; "
            f"{instead}",
        )
    if isinstance(config, HILSerlRobotEnvConfig):
        raise UserError(
            "--env.type",
            f"'{config.type}' ({config.name}) is LeRobot's HIL-SERL set-up, which only lerobot.rl builds; "
            f"{instead}",
        )


def make_single_env(config: EnvConfig, task_index: int = 0) -> Any:
    """Build one bare environment of a LeRobot ``EnvConfig``.

    LeRobot's vector environments reset or freeze a sub-environment on their own, which would lose
    the last observation; the environment inside them does not.

    Args:
        config: any LeRobot environment config, ours included.
        task_index: which of the config's tasks, where it has several.

    Raises:
        UserError: a package is missing, or ``create_envs`` gives no environments of this process.
    """
    config = chunked(config)
    try:
        suites = config.create_envs(1, False)
    except ImportError as error:
        # LeRobot says that the whole package is missing, where it may be something that it needs.
        cause = f"{reason(error.__cause__)}: " if error.__cause__ else ""
        raise UserError("--env.type", f"'{config.type}' does not run here: {cause}{reason(error)}") from error
    tasks = [vec for by_task in suites.values() for vec in by_task.values()]
    for index, vec in enumerate(tasks):
        if index != task_index % len(tasks):
            vec.close()
    chosen = tasks[task_index % len(tasks)]
    if not hasattr(chosen, "envs"):
        raise UserError(
            "--env.type",
            f"create_envs of '{config.type}' must give a gymnasium.vector.SyncVectorEnv, it gives a "
            f"{type(chosen).__name__}",
        )
    return chosen.envs[0]
