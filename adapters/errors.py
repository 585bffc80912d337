"""The one exception that means: the user can mend this."""

from __future__ import annotations


class UserError(Exception):
    """Bad input. The command line prints it as one line and exits with code 2.

    Args:
        option: what the user has to change, as they would write it (``--policy.path``).
        message: what is wrong and how to mend it, in one sentence.
    """

    def __init__(self, option: str, message: str) -> None:
        self.option = option
        self.message = " ".join(str(message).split())
        super().__init__(option, self.message)

    def __str__(self) -> str:
        return f"{self.option}: {self.message}"


def reason(error: BaseException, last: bool = False) -> str:
    """The first (or last) line of an exception's text, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[-1 if last else 0].strip() if lines else type(error).__name__
