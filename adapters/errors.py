"""The one exception that means: the user can mend this."""

import errno

# Of a disk or its rights, which the user can mend.
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG)
LONGEST = 600  # characters of a foreign error's text that a line of ours repeats


class UserError(Exception):
    """Bad input. The command line prints it as one line and exits with code 2.

    ``option`` is what the user has to change, as they would write it (``--policy.path``), ``message`` what is
    wrong and how to mend it, in one sentence.
    """

    def __init__(self, option: str, message: str) -> None:
        self.option = option
        self.message = " ".join(str(message).split())
        super().__init__(option, self.message)

    def __str__(self) -> str:
        return f"{self.option}: {self.message}"


def at_least(least: float, config: object, prefix: str, *names: str) -> None:
    """Refuse fields of ``config`` below ``least``; their options begin with ``prefix``. ``None`` passes."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= least:
            must = f"must be at least {least}" if least else "cannot be negative"
            raise UserError(f"{prefix}{name}", f"{must}, got {value}")


def policy_error(message: str) -> UserError:
    """The error of a base policy that cannot be used as it is: another ``--policy.path``, or a mended one."""
    return UserError("--policy.path", message)


def reason(error: BaseException, last: bool = False) -> str:
    """What an exception says, on one line: all of its text, and what its cause adds.

    Libraries put the sentence that helps on a later line, or into the ``__cause__``: draccus says "Couldn't
    instantiate class X" where the class itself says why. A long text keeps its beginning and its end.
    ``last`` takes the last line alone, for the output of another process, which ends in its error.
    """
    if last:
        lines = str(error).strip().splitlines()
        return lines[-1].strip() if lines else type(error).__name__
    text, cause = _one_line(error), error.__cause__
    if cause is None or " ".join(str(cause).split()) in text:
        return text
    return f"{text} ({_one_line(cause)})"


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if not text:
        return type(error).__name__
    if " " not in text:  # a KeyError says no more than the key
        return f"{type(error).__name__}: {text}"
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"
    return text
