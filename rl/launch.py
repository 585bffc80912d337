"""``accelerate launch`` for runs that are stopped from outside: exit code 0 where they ended well.

    python -m trimtab.rl.launch --config_file recipes/configs/accelerate/gpu_8.yaml -m trimtab.rl.train ...

takes what ``accelerate launch`` takes. Its launcher answers SIGTERM and SIGINT by handing them on, killing
after 30 seconds what still runs, and ending with a traceback and exit code 1, also where every process has
written its share of a checkpoint and ended with 0. This one hands them on and waits.
"""

import contextlib
import signal
import sys
from types import FrameType


def main(args: list[str]) -> None:
    """Run ``accelerate launch`` with ``args``."""
    import psutil
    from accelerate.commands.launch import launch_command, launch_command_parser

    def hand_on(number: int, frame: FrameType | None) -> None:
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.Error):
                child.send_signal(number)

    arguments = launch_command_parser().parse_args(args)
    arguments.signals_to_handle = "SIGHUP,SIGQUIT"  # torchrun's: all others are left to us
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, hand_on)
    launch_command(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
