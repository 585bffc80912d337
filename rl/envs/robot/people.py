"""Who says what happens at a robot: a person at a keyboard, or a script that plays one.

Between episodes the station asks ``start(robot, episode)`` about twenty times a second: true once the scene
is ready. At every control step it asks ``said(robot, step)``: one of ``EVENTS``, or ``None``; between
episodes too, with step -1, where ``stop`` counts, and ``takeover`` and ``release`` if the robot is driven to
the start. It ends with ``close()``.
"""

from __future__ import annotations

import importlib
import queue
from typing import Any, Protocol

from lerobot.utils.keyboard_input import create_key_listener

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
        self._listener = create_key_listener(self._keys.put)
        if self._listener is None:
            raise UserError(
                "--robot.person", "no keys can be read here: run it in a terminal, or name MODULE:CLASS"
            )
        self._taken = self._stopped = self._waiting = False
        self._kept: list[str] = []  # pressed between episodes, for `said`
        print(f"keys: {HELP}")

    def start(self, robot: Any, episode: int) -> bool:
        keys = self._pressed()
        self._stopped |= "stop" in [KEYS.get(key) for key in keys]
        ready = "enter" in keys and not self._stopped
        self._taken &= self._waiting and not ready
        self._waiting = not ready
        self._kept = [key for key in keys if KEYS.get(key) == "takeover"]
        return ready

    def said(self, robot: Any, step: int) -> str | None:
        if self._stopped:
            return "stop"
        for key in self._kept if step < 0 else self._pressed():
            if KEYS.get(key) == "takeover":
                self._taken = not self._taken
                return "takeover" if self._taken else "release"
            if key in KEYS:
                return KEYS[key]
        return None

    def _pressed(self) -> list[str]:
        return [self._keys.get() for _ in range(self._keys.qsize())]

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
