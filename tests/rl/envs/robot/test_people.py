"""What a person says by the keys of a terminal."""

import os
import sys
import time

import pytest
from lerobot.utils.keyboard_input import TerminalKeyListener

from trimtab.rl.envs.robot.people import Keyboard


@pytest.fixture
def keys(monkeypatch):
    """A keyboard at a terminal of its own, and what presses its keys."""
    monkeypatch.delenv("DISPLAY", raising=False)
    ours, theirs = os.openpty()
    with os.fdopen(theirs) as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        person = Keyboard()
        yield person, lambda text: os.write(ours, text)
        person.close()
    os.close(ours)


def answer(ask):
    """What ``ask`` gives once it gives something: keys come from another thread."""
    until = time.monotonic() + 5
    while not (found := ask()) and time.monotonic() < until:
        time.sleep(0.01)
    return found


def test_keys_start_and_end_episodes(keys):
    person, press = keys
    assert not person.start(None, 0)
    press(b"s")  # too early: it counts for nothing
    time.sleep(0.1)
    assert not person.start(None, 0)
    press(b"\n")
    assert answer(lambda: person.start(None, 0))
    for key, said in ((b"x", None), (b"s", "success"), (b"f", "failure"), (b"r", "drop")):
        press(key)
        assert (answer(lambda: person.said(None, 3)) if said else person.said(None, 3)) == said
    for said in ("takeover", "release", "takeover"):
        press(b" ")
        assert answer(lambda: person.said(None, 4)) == said


def test_between_episodes_space_drives_the_robot_until_ready(keys):
    person, press = keys
    for _ in range(2):
        person.forget()  # as a station does before it asks
        for said in ("takeover", "release", "takeover"):
            press(b" ")
            assert answer(lambda: person.start(None, 0) or person.said(None, -1)) == said
        press(b"\n")
        assert answer(lambda: person.start(None, 0)) is True
        press(b" ")  # takes over in the episode, and has it at its end
        assert answer(lambda: person.said(None, 4)) == "takeover"


def test_an_enter_of_before_starts_nothing(keys):
    person, press = keys
    press(b"\n \n")
    answer(lambda: person._keys.qsize() == 3)
    person.forget()
    assert not person.start(None, 0) and person.said(None, -1) is None
    press(b"\n")
    assert answer(lambda: person.start(None, 0))


def test_no_key_is_lost_and_caps_lock_changes_nothing(keys):
    person, press = keys
    press(b" Sq")
    answer(lambda: person._keys.qsize() == 3)
    assert [person.said(None, 3) for _ in range(4)] == ["takeover", "success", "stop", "stop"]
    person.forget()
    assert not person.start(None, 1) and person.said(None, -1) == "stop"


def test_a_terminal_hears_its_own_keys_alone(keys):
    """Not those of any window, as LeRobot's first choice does where there is a screen."""
    assert isinstance(keys[0]._listener, TerminalKeyListener)


def test_stop_is_heard_between_episodes(keys):
    person, press = keys
    press(b"q\n")
    answer(lambda: person._keys.qsize() == 2)
    assert not person.start(None, 0) and person.said(None, -1) == "stop"
