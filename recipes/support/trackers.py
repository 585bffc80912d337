"""`--trackers=tensorboard,wandb`: metrics to trackers, through Accelerate. A tracker never stops a run."""

from __future__ import annotations

from typing import Any

from trimtab.adapters import UserError
from trimtab.adapters.errors import reason


def check_trackers(names: str | None) -> list[str]:
    """The trackers in a comma-separated list.

    Raises:
        UserError: one that Accelerate does not know, or that is not installed.
    """
    wanted = [name.strip() for name in (names or "").split(",") if name.strip()]
    if not wanted:
        return []
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    known = sorted(str(name) for name in LOGGER_TYPE_TO_CLASS)
    available = {str(name) for name in get_available_trackers()}
    for name in wanted:
        if name not in known:
            raise UserError("--trackers", f"'{name}' is none of {', '.join(known)}")
        if name not in available:
            raise UserError("--trackers", f"{name} is not installed: pip install {name}")
    return wanted


class Trackers:
    """Sends lines of metrics to an accelerator's trackers, and gives up on them at the first failure.

    Args:
        accelerator: made with ``log_with``.
        names: of the trackers.
        project: name of the project there.
        config: of the run.
    """

    def __init__(self, accelerator: Any, names: list[str], project: str, config: dict[str, Any]) -> None:
        self.accelerator, self.live = accelerator, False
        if names:
            self._try(lambda: accelerator.init_trackers(project, config), True)

    def __call__(self, line: dict[str, Any]) -> None:
        if self.live:
            numbers = {k: v for k, v in line.items() if isinstance(v, int | float)}
            self._try(lambda: self.accelerator.log(numbers, step=line["env_steps"]), True)

    def close(self) -> None:
        if self.live:
            self._try(self.accelerator.end_training, False)

    def _try(self, part: Any, live: bool) -> None:
        try:
            part()
            self.live = live
        except (Exception, SystemExit) as error:  # somebody else's code, and perhaps somebody else's network
            self.live = False
            print(f"no tracking from here on ({type(error).__name__}: {reason(error)}); the run goes on")
