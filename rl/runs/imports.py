"""LeRobot's imports in two thirds of the time."""

import gc
import importlib.metadata
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache


@contextmanager
def quick_imports() -> Iterator[None]:
    """Import LeRobot without what nobody needs of it.

    The collector looks for garbage while modules are made, and once more at the end of the process: there is
    none. transformers and diffusers each list all packages that are installed.
    """
    if "transformers" in sys.modules:
        yield
        return
    listed, collecting = importlib.metadata.packages_distributions, gc.isenabled()
    importlib.metadata.packages_distributions = cache(listed)
    gc.disable()
    try:
        yield
    finally:
        importlib.metadata.packages_distributions = listed
        gc.freeze()
        if collecting:
            gc.enable()
