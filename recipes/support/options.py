"""The options of a command: preset < file < command line, merged as data and decoded once."""

import dataclasses
import difflib
import types
import typing
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import draccus
from draccus.utils import flatten
from lerobot.configs.parser import print_scoped_help

from trimtab.adapters.checkpoint.folder import is_server
from trimtab.adapters.errors import UserError, reason
from trimtab.recipes.cli import COMMANDS, REMOVED
from trimtab.recipes.cli.recipes import ABOUT, ADAPT, BASE, COMPARE, FOLDER, LORA, RECIPES
from trimtab.recipes.compare.from_recipe import comparison, is_recipe
from trimtab.recipes.support.console import say
from trimtab.recipes.support.group_defaults import is_choices, members, with_defaults
from trimtab.recipes.support.option_dicts import (
    CONFIG_PATH,
    Flag,
    Options,
    load_plugins,
    merge,
    put,
    read_arguments,
    read_options,
    value_at,
)
from trimtab.recipes.support.robot_options import (
    as_of_robot,
    robot_defaults,
    with_robot,
    without_environment,
)
from trimtab.rl.algorithms import AlgorithmConfig
from trimtab.rl.algorithms.presets import BUDGETS, IMPLIED_DEFAULTS, PAPER

HELP = ("-h", "--help")
PRESET = "rl.preset"
TINY_HELP = """

--tiny=true: a random tiny policy of the same type in the place of the checkpoint, in an environment that is
installed, with budgets of seconds (--tiny=TYPE says which type).
--config_path=FILE or the name of a recipe (`trimtab recipes`)."""
# Commands that also take adapt's file, and what of it they leave beside the options that they lack.
TAKES_ADAPTS = {"eval": (), "probe": ("eval", "seed")}


def parse[Config](
    config_class: type[Config], command: str, args: list[str], stack: ExitStack | None = None
) -> Config:
    """The config that the ``--option=value`` arguments of a command ask for.

    ``stack`` closes, after the command, what a tiny run has started.

    Raises:
        UserError: an unknown option or a value that does not fit, named.
        SystemExit: after printing help.
    """
    given = read_arguments([arg for arg in args if arg not in HELP])
    tiny = str(given.pop("tiny", "false")).lower()
    path = config_file(given.pop("config_path", None), command)
    names = {field.name for field in dataclasses.fields(config_class)}
    if "resume" in names:
        from trimtab.recipes.support.run_folder import resumed

        path = resumed(given, path)
    content, given = load_plugins(read_options(path) if path else {}, given)
    content.pop(ABOUT, None)
    if "env" in names:
        content, given = with_robot(content), with_robot(given)
    content = fitted(content, command, names, path)
    if command == "eval" and value_at(given, "policy.path") and isinstance(content.get("policy"), dict):
        content["policy"] = of_artefact(content["policy"], str(given["policy"]["path"]))
    below: Options = {}
    if "rl" in names:
        if value_at(given, "train.env_steps") and not value_at(given, "train.episodes"):
            put(given, "train.episodes", None)  # a file's, or a robot's, would take its place
        below, content, given = with_algorithm(content, given)
    values = merge(below, merge(content, given))
    if "demos" in names and value_at(values, "env.type") is None:
        values = merge(without_environment(values), values)
    if value_at(values, "env.type") == "robot":
        values = merge(robot_defaults(names), values)
    if set(HELP) & set(args):
        print(f"usage: trimtab {command} [--option=value ...]{TINY_HELP if COMMANDS[command].tiny else ''}")
        kinds = {name: value for name, value in flatten(values).items() if name.endswith(".type")}
        print_scoped_help(config_class, [f"--{name}={value}" for name, value in kinds.items()])
        raise SystemExit(0)
    say_left_out(config_class, content, given)
    if tiny != "false":
        from trimtab.recipes.support.tiny import tiny_options

        values = tiny_options(stack or ExitStack(), values, given, command, tiny)
    return decode(config_class, command, values, given, path)


def config_file(name: Any, command: str) -> Path | None:
    """The file that ``--config_path`` names: by its path, by a recipe, or by ``recipes/configs/...``."""
    if name is None or Path(str(name)).is_file():
        return name and Path(str(name))
    folder = FOLDER / str(name).removeprefix("recipes/configs/")
    own = {"lora": LORA, "compare": COMPARE, "base": BASE}.get(command, ADAPT)
    for path in (folder, folder / own, folder / ADAPT):
        if path.is_file():
            return path
    known = ", ".join(RECIPES)
    raise UserError(CONFIG_PATH, f"there is no file {name}, and no such recipe; there are {known}")


def fitted(content: Options, command: str, names: set[str], path: Path | None) -> Options:
    """What ``command``, whose options are ``names``, takes of a file: of adapt's what concerns it."""
    if path and command == "compare" and is_recipe(content):
        beside = path.with_name(LORA)
        lora = read_options(beside) if beside.is_file() else None
        return comparison(content, lora, is_server(value_at(content, "policy.path")))
    if not content or command not in TAKES_ADAPTS:
        return content
    from trimtab.recipes.cli.adapt import AdaptConfig

    others = {field.name for field in dataclasses.fields(AdaptConfig)} - names
    if others & set(content):
        others |= set(TAKES_ADAPTS[command])
    return {name: value for name, value in content.items() if name not in others}


def of_artefact(policy: Options, path: str) -> Options:
    """Of a file's options for its policy, those that hold for the one at ``path``.

    An artefact knows how its base was loaded when it was steered, and the file may be of another run.
    """
    from trimtab.policies.artefact import LOADED_WITH, is_artefact

    own = LOADED_WITH if is_artefact(path) else ()
    return {name: value for name, value in policy.items() if name not in own}


def with_algorithm(content: Options, given: Options) -> tuple[Options, Options, Options]:
    """The options of a command that learns: a preset, the file's ``content``, and what is ``given`` above it.

    What goes with an algorithm unless said otherwise (``IMPLIED_DEFAULTS``) is a preset too. Where the
    command line names another algorithm than the file, it comes with the command line: the file's was for
    the other one.

    Raises:
        UserError: an unknown preset, or an algorithm without it.
    """
    before, now = value_at(content, "rl.type"), value_at(given, "rl.type")
    algorithm, preset = str(now or before or "dsrl_sac"), value_at(given, PRESET)
    if preset not in (None, "default", "paper"):
        raise UserError(f"--{PRESET}", f"'{preset}' is none of default, paper")
    if preset == "paper" and algorithm not in PAPER:
        raise UserError(f"--{PRESET}", f"{algorithm} has no paper preset; {', '.join(PAPER)} have")
    if preset:
        rl = {name: value for name, value in given["rl"].items() if name != "preset"}
        given = {name: value for name, value in {**given, "rl": rl}.items() if value != {}}
    if algorithm in BUDGETS:
        spent = f"has no effect on {algorithm}, which counts successes and spends {BUDGETS[algorithm]}"
        for name in ("env_steps", "episodes", "offline_updates", "restart", "gate.enabled"):
            if value_at(given, f"train.{name}"):
                raise UserError(f"--train.{name}", spent)
        if value_at(merge(content, given), "train.reward") == "env":
            raise UserError("--train.reward", f"env {spent}")
    below = merge(PAPER[algorithm], {"rl": {"type": algorithm}}) if preset == "paper" else {}
    implied = IMPLIED_DEFAULTS.get(algorithm, {})
    if None not in (before, now) and before != now:
        said, content, given = given, without_implied(content, str(before)), merge(implied, given)
    else:
        said, below = merge(content, given), merge(below, implied)
    for name, value in flatten(implied).items():
        if value_at(said, name) is None:
            say(f"{algorithm} takes --{name}={value} unless another is named")
    return below, content, given


def without_implied(content: Options, algorithm: str) -> Options:
    """A file's options without those outside of ``rl`` that are the algorithm's own: its pace, its noise."""
    own = dict(IMPLIED_DEFAULTS.get(algorithm, {}))
    if algorithm in AlgorithmConfig.get_known_choices():
        own["train"] = dict(AlgorithmConfig.get_choice_class(algorithm).pace)
    found = dict(content)
    for part, values in own.items():
        if isinstance(found.get(part), dict):
            same = {name for name, value in values.items() if found[part].get(name) == value}
            found[part] = {n: v for n, v in found[part].items() if n not in same and "type" not in same}
    return {name: value for name, value in found.items() if value != {}}


def say_left_out(config_class: type, content: Options, given: Options) -> None:
    """Say of each part of a file that gets another type what differed from its type's defaults."""
    for name, options in content.items():
        before, now = value_at(content, f"{name}.type"), value_at(given, f"{name}.type")
        if None in (before, now) or before == now:
            continue
        registry = members(typing.get_type_hints(config_class).get(name))[0]
        try:
            defaults = flatten(draccus.encode(registry.get_choice_class(before)()))
        except (AttributeError, KeyError, TypeError):  # unknown, or with required options
            defaults = {}
        chosen = [n for n, v in flatten(options).items() if n != "type" and (n, v) not in defaults.items()]
        if chosen:
            lost = ", ".join(f"{name}.{one}" for one in chosen)
            say(f"--{name}.type={now} takes its own defaults; of the file's {before}, left out: {lost}")


def decode[Config](
    config_class: type[Config], command: str, values: Options, given: Options, path: Path | None
) -> Config:
    """The config of ``values``; a ``UserError`` names what does not fit, and ``path`` if that said it."""
    try:
        check_names(config_class, values, "", command)
        return draccus.decode(config_class, with_defaults(config_class, values))
    except (UserError, draccus.utils.ParsingError, ValueError, TypeError, KeyError, AttributeError) as error:
        found = _user_error(error, path)
    name = found.option.removeprefix("--")
    found = as_of_robot(found) if value_at(values, "env.type") == "robot" else found
    if path and value_at(given, name) is None and value_at(values, name) is not None:
        raise UserError(found.option, f"{found.message} (in {path})")
    raise found


def _user_error(error: BaseException, path: Path | None) -> UserError:
    """What draccus raised, as the option that it is about; what a config says of its own fields, as it is."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError):
            return cause
        cause = cause.__cause__
    if keys := getattr(error, "key_path", ()):
        return UserError(f"--{'.'.join(map(str, keys))}", error.message)
    return UserError(f"{CONFIG_PATH}={path}" if path else "options", reason(error))


def check_names(cls: type, values: Options, where: str, command: str) -> None:
    """Refuse options below ``where`` that ``cls`` does not have, and the lack of one that it needs."""
    kind = None
    if is_choices(cls):
        kind, choices = values.get("type", cls.default_choice_name()), cls.get_known_choices()
        if kind is None:
            raise UserError(
                f"--{where}{next(iter(flatten(values)))}",
                f"which options there are depends on --{where}type; name that too",
            )
        if kind not in choices:
            known = ", ".join(sorted(choices))
            raise UserError(f"--{where}type", f"invalid choice: '{kind}' (choose from {known})")
        cls, values = choices[kind], {name: value for name, value in values.items() if name != "type"}
    fields, hints = {field.name: field for field in dataclasses.fields(cls)}, typing.get_type_hints(cls)
    for name, value in values.items():
        if name not in fields:
            whole = next(iter(flatten({str(name): value})), str(name))
            of = f" of --{where}type={kind}" if kind else ""
            raise UserError(f"--{where}{whole}", unknown(str(name), where, list(fields), of, command))
        kinds = members(hints[name])
        if isinstance(value, Flag) and bool not in kinds:
            raise UserError(f"--{where}{name}", "expects a value")
        if isinstance(value, dict | list) and {*kinds} <= {str, types.NoneType}:
            raise UserError(
                f"--{where}{name}", f"is a text, which YAML took for {value}; quote it twice: '\"...\"'"
            )
        parts = [one for one in kinds if dataclasses.is_dataclass(one) or is_choices(one)]
        if len(parts) != 1 or value is None or value == {}:
            continue
        if isinstance(value, dict):
            check_names(parts[0], value, f"{where}{name}.", command)
        elif len(kinds) == 1 or types.NoneType in kinds:
            raise UserError(f"--{where}{name}", f"is a group of options, --{where}{name}.NAME=; got {value}")
    for name, field in fields.items():
        required = field.init and field.default is field.default_factory is dataclasses.MISSING
        if required and values.get(name, {}) == {}:
            if name == "env":
                raise UserError(
                    "--env.type",
                    "name the environment, for instance --env.type=metaworld_state or --env.type=pusht",
                )
            raise UserError(f"--{where}{name}", "this option is required")


def unknown(name: str, where: str, known: list[str], of: str, command: str) -> str:
    """What to say of an option that is not there."""
    if replacement := REMOVED.get(f"{command} --{where}{name}"):
        return f"is gone: {replacement}"
    close = difflib.get_close_matches(name, known, 1)
    meant = f"; did you mean --{where}{close[0]}?" if close else ""
    return f"no such option{of}{meant}; `trimtab {command} --help` lists them"
