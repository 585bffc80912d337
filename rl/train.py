"""``accelerate launch -m trimtab.rl.train ...``: ``trimtab adapt`` in each process."""

import sys
from importlib.metadata import entry_points

if __name__ == "__main__":  # before torch is imported
    from trimtab.rl.runs.threads import spin_briefly

    spin_briefly()


def main(args: list[str]) -> int:
    """Run ``trimtab adapt``, looked up as the installed command, for this layer knows nothing of recipes."""
    (command,) = entry_points(group="console_scripts", name="trimtab")
    return command.load()(["adapt", *args])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
