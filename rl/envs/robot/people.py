"""Who says what happens at a robot: a person at a keyboard, or a script that plays one.

Between episodes the station asks ``start(robot, episode)`` about twenty times a second: true once the scene
is ready. At every control step it asks ``said(robot, step)``: one of ``EVENTS``, or ``None``; between
episodes too, with step -1, where ``stop`` counts, and ``takeover`` and ``release`` if the robot is driven to
the start. ``forget()``, if it has that, comes before each question for the next scene: what it was told until
then answers another one, but ``stop``. It ends with ``close()``.
"""

import importlib
import queue
import sys
from typing import Any, Protocol

from lerobot.utils.keyboard_input import TerminalKeyListener, create_key_listener

from trimtab.adapters.errors import UserError, reason
from trimtab.rl.envs.robot.config import KEYBOARD

EVENTS = ("success", "failure", "drop", "takeover", "release", "stop")
KEYS = {"s": "success", "f": "failure", "r": "drop", "space": "takeover", "esc": "stop", "q": "stop"}
HELP = "Enter ready, s success, f failure, r drop this episode, space take over / give back, Esc stop"


class Person(Protocol):
    """See the module."""

    def start(self, robot: Any, episode: int) -> bool: ...
    def said(self, robot: Any, step: int) -> str | None: ...
    def close(self) -> None: ...


class Keyboard:
    """A person at the station's terminal, over SSH too.

    Raises:
        UserError: there is no terminal to read keys from.
    """

    def __init__(self) -> None:
        self._keys: queue.SimpleQueue[str] = queue.SimpleQueue()
        # LeRobot's choice may hear keys in any window. An Enter in a browser must move no arm.
        if sys.platform != "win32" and sys.stdin.isatty():
            self._listener: Any = TerminalKeyListener(self._keys.put)
            self._listener.start()
        else:
            self._listener = create_key_listener(self._keys.put)
        if self._listener is None:
            raise UserError(
                "--robot.person", "no keys can be read here: run it in a terminal, or name MODULE:CLASS"
            )
        self._taken = self._stopped = False
        self._kept: list[str] = []  # pressed, and not yet told
        print(f"keys: {HELP}")

    def forget(self) -> None:
        self._listen()
        self._kept, self._taken = [], False

    def start(self, robot: Any, episode: int) -> bool:
        ready = "enter" in self._listen() and not self._stopped
        self._kept = [] if ready else [key for key in self._kept if KEYS.get(key) == "takeover"]
        self._taken &= not ready
        return ready

    def said(self, robot: Any, step: int) -> str | None:
        if step >= 0:
            self._listen()
        while self._kept:
            event = KEYS.get(self._kept.pop(0))
            if event == "takeover":
                self._taken = not self._taken
                return "takeover" if self._taken else "release"
            if event:
                return event
        return "stop" if self._stopped else None

    def _listen(self) -> list[str]:
        """Keep the keys that were pressed since the last time, and return them."""
        keys = [self._keys.get().lower() for _ in range(self._keys.qsize())]
        self._stopped |= "stop" in map(KEYS.get, keys)
        self._kept += keys
        return keys

    def close(self) -> None:
        self._listener.stop()


def make_person(name: str, options: dict[str, Any]) -> Person:
    """The person that ``--robot.person`` names.

    Raises:
        UserError: it cannot be made.
    """
    if name == KEYBOARD:
        return Keyboard()
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)(**options)
    except Exception as error:  # a script of the user's
        raise UserError("--robot.person", f"'{name}' cannot be made: {reason(error)}") from error
