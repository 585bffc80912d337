"""A LeRobotDataset opened, or one line that says why it cannot be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from trimtab.adapters.errors import UserError, reason


def open_dataset(group: str, name: str | None, root: str | Path | None, make: Callable[[], Any]) -> Any:
    """What ``make`` opens: the dataset that the options ``GROUP.repo_id`` and ``GROUP.root`` name.

    Raises:
        UserError: it is not there, or is broken.
    """
    option = f"{group}.root" if root else f"{group}.repo_id"
    if root and not Path(root).expanduser().is_dir():
        raise UserError(option, f"there is no folder {root}")
    try:
        return make()
    except Exception as error:  # LeRobot, datasets and the Hub have their own for each way to fail
        raise unreadable(option, name, root, error) from error


def unreadable(option: str, name: str | None, root: str | Path | None, error: Exception) -> UserError:
    """The line about a dataset that cannot be opened, with the command that mends it, if LeRobot says one."""
    folder = Path(root).expanduser() if root else None
    if folder and not (folder / "meta" / "info.json").is_file():  # LeRobot then asks the Hub
        held = ", ".join(sorted(path.name for path in folder.iterdir())[:8])
        why = f"it has no meta/info.json; it holds {held or 'nothing'}"
    else:
        why = reason(error)
        lines = [line.strip() for line in str(error).splitlines()]
        for at, line in enumerate(lines):
            if line.startswith("python -m "):  # up to the command; its own is for a dataset on the Hub
                where = f" --root={folder} --push-to-hub=false" if folder else ""
                why = " ".join(said for said in (*lines[:at], line + where) if said.strip("`"))
                break
    return UserError(option, f"cannot read {root or name} as a LeRobotDataset: {why}")
