"""Trackers get the numbers of a run through Accelerate, and never stop it."""

import pytest
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker

from trimtab.adapters import UserError
from trimtab.recipes.support.launched import Trackers, check_trackers


class Tracker(GeneralTracker):
    """One of Accelerate's own kind, whose service is there, or goes away after some lines."""

    name, requires_logging_directory, main_process_only = "tests", False, True

    def __init__(self, lines=10**9):
        self.left, self.got, self.closed = lines, [], False
        super().__init__()

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values):
        self.config = values

    def log(self, values, step=None, **named):
        if self.left == 0:
            raise ConnectionError("the service is offline")
        self.left -= 1
        self.got.append((step, values))

    def finish(self):
        self.closed = True


def test_numbers_arrive_and_text_does_not():
    tracker = Tracker()
    trackers = Trackers(Accelerator(cpu=True, log_with=[tracker]), {"seed": 3})
    trackers({"env_steps": 100, "success_rate": 0.5, "acting": "actor"})
    trackers.close()
    assert tracker.config == {"seed": 3}
    assert tracker.got == [(100, {"env_steps": 100, "success_rate": 0.5})] and tracker.closed


@pytest.mark.parametrize("lines", [0, 1])
def test_one_that_goes_offline_is_left_alone(lines, capsys):
    tracker = Tracker(lines)
    trackers = Trackers(Accelerator(cpu=True, log_with=[tracker]), {})
    for step in range(4):
        trackers({"env_steps": step})
    trackers.close()
    assert len(tracker.got) == lines
    out = capsys.readouterr().out
    assert out.count("no tracking from here on (ConnectionError: the service is offline)") == 1


def test_names():
    assert check_trackers(None) == check_trackers("") == []
    assert check_trackers("wandb, wandb") == ["wandb", "wandb"]
    with pytest.raises(UserError, match=r"--trackers: 'abacus' is none of"):
        check_trackers("wandb,abacus")
    with pytest.raises(UserError, match=r"--trackers: aim is not installed: pip install aim"):
        check_trackers("aim")
