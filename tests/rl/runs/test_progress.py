"""Progress: a bar on a terminal, a line now and then in a log."""

import io

import pytest

from trimtab.rl.runs import progress
from trimtab.rl.runs.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def written(monkeypatch, stream, every=60.0, **named):
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr(progress, "EVERY", every)
    bar = Progress(total=500, desc="steering", unit="step", **named)
    for _ in range(500):
        bar.update()
        bar.set_postfix_str("success 0.50")
    bar.close()
    return stream.getvalue()


def test_a_log_gets_one_line_at_the_end(monkeypatch):
    (line,) = written(monkeypatch, io.StringIO()).split("\n")[:-1]
    assert line.startswith("steering: 500/500, ") and line.endswith(" step/s, success 0.50")
    assert "\r" not in line


def test_a_bar_that_goes_leaves_nothing_in_a_log(monkeypatch):
    assert written(monkeypatch, io.StringIO(), leave=False) == ""
    assert written(monkeypatch, io.StringIO(), disable=True) == ""


def test_a_log_of_a_long_run_has_lines_on_the_way(monkeypatch):
    assert len(written(monkeypatch, io.StringIO(), every=0.0).splitlines()) > 100


def test_a_terminal_gets_the_bar(monkeypatch):
    assert "\r" in written(monkeypatch, Terminal()) and "100%" in written(monkeypatch, Terminal())


@pytest.mark.parametrize("module", ["recipes", "rl"])
def test_all_bars_are_this_one(module):
    from pathlib import Path

    for path in (Path(__file__).parents[3] / module).rglob("*.py"):
        text = path.read_text()
        assert path.name == "progress.py" or not ("trange(" in text or " tqdm(" in text), path
