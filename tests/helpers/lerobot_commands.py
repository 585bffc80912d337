"""LeRobot's commands in this process: one of its own imports for longer than it runs."""

import logging
import sys


def run(main, arguments, monkeypatch):
    """Call ``main`` as with ``arguments`` on the command line; its logging ends with it."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    monkeypatch.setattr(sys, "argv", [main.__module__, *arguments])
    main()
    root.handlers[:], root.level = handlers, level
