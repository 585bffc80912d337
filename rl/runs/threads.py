"""How many threads torch takes, and how they wait for each other: what the user's environment says wins.

OpenMP's threads spin while they wait for each other. On a busy machine one of them is not running, and the
others spin for a time slice, at each of torch's small operations. Threads that spin for some microseconds and
then sleep let the rest of the machine work, and lose nothing on an idle one: an update of best_of_n (two
threads, two cores) takes 17.9 ms so and 17.8 by default; with two other programs beside, 34 and up to 1,200.

OpenMP reads the variable when it is loaded, so this module imports no torch and has to act before torch is.
"""

import os

# What says how OpenMP's threads wait: the standard's, GNU's and LLVM's variable.
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
SPINS = "1000"  # of GNU's loop
# What says how many there are, in torch's order.
COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def spin_briefly() -> None:
    """Let GNU OpenMP's threads spin but shortly, unless the environment says how they wait."""
    if not any(os.environ.get(name) for name in WAITING):
        os.environ["GOMP_SPINCOUNT"] = SPINS


def threads_said() -> int | None:
    """The number of threads that the environment asks for, if it does."""
    for name in COUNTS:
        first = os.environ.get(name, "").split(",")[0].strip()  # OpenMP takes a list, one for each level
        if first.isdecimal() and int(first) > 0:
            return int(first)
    return None


def machine_record() -> dict[str, object]:
    """``{"threads", "waiting"}``: torch's threads now, and the variables that say how they wait."""
    import torch

    waiting = {name: os.environ[name] for name in WAITING if os.environ.get(name)}
    return {"threads": torch.get_num_threads(), "waiting": waiting}
