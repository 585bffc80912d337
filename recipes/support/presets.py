"""``--rl.preset=paper``: one flag for all settings of an algorithm's paper."""

from __future__ import annotations

from trimtab.recipes.support.recipe_file import file_options, read_options

OPTION = "--rl.preset"


def expand_preset(args: list[str]) -> list[str]:
    """Replace ``--rl.preset=paper`` by the options that it stands for.

    What is given on the command line or in ``--config_path`` wins over the preset, wherever it stands.

    Raises:
        UserError: another name than ``default`` or ``paper``, or an algorithm without that preset.
    """
    names = [arg.split("=", 1)[0] for arg in args]
    if OPTION not in names:
        return args
    from trimtab.adapters.errors import UserError
    from trimtab.rl.algorithms.presets import PAPER, flatten

    rest, preset = list(args), ""
    while OPTION in names:
        at = names.index(OPTION)
        apart = "=" not in rest[at] and at + 1 < len(rest)
        preset = rest[at + 1] if apart else rest[at].partition("=")[2]
        del rest[at : at + 1 + apart], names[at : at + 1 + apart]
    if preset == "default":
        return rest
    if preset != "paper":
        raise UserError(OPTION, f"'{preset}' is none of default, paper")
    given = _from_file(rest) | {name.removeprefix("--") for name in names if name.startswith("--")}
    algorithm = _value(rest, "--rl.type") or _value_in_file(rest) or "dsrl_sac"
    if algorithm not in PAPER:
        raise UserError(OPTION, f"{algorithm} has no paper preset; {', '.join(PAPER)} have")
    settings = flatten({**PAPER[algorithm], "rl": {"type": algorithm, **PAPER[algorithm]["rl"]}})
    return [f"--{name}={value}" for name, value in settings.items() if name not in given] + rest


def _value(args: list[str], option: str) -> str | None:
    """The last value that ``option`` has in ``args``."""
    found = None
    for index, arg in enumerate(args):
        if arg.startswith(option + "="):
            found = arg.split("=", 1)[1]
        elif arg == option and index + 1 < len(args):
            found = args[index + 1]
    return found


def _file(args: list[str]) -> dict:
    """What counts in the file of ``--config_path``; nothing where parsing will say what is wrong."""
    return file_options(args) or {}


def _from_file(args: list[str]) -> set[str]:
    """Dotted names of the options in the file that ``--config_path`` names."""
    from trimtab.rl.algorithms.presets import flatten

    return set(flatten(_file(args)))


def _value_in_file(args: list[str]) -> str | None:
    rl = _file(args).get("rl")
    return rl.get("type") if isinstance(rl, dict) else None


def value_of(args: list[str], name: str) -> str | None:
    """What the command line, or else the file of ``--config_path``, says of the option ``name`` (dotted)."""
    from trimtab.rl.algorithms.presets import flatten

    value = _value(args, f"--{name}")
    return flatten(_file(args)).get(name) if value is None else value


def noise_said(args: list[str], algorithm: str) -> bool:
    """Whether the noise space is named: on the command line, or in a file that names no other algorithm."""
    if _value(args, "--noise.type") is not None:
        return True
    held = read_options(_value(args, "--config_path")) or {}
    parts = (held.get("rl"), held.get("noise"))
    before, noise = (part.get("type") if isinstance(part, dict) else None for part in parts)
    return before in (None, algorithm) and noise is not None
