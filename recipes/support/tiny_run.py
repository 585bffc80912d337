"""``--tiny=true``: a recipe on a random tiny policy of the same type, so that all of it runs anywhere.

The checkpoint gives way to an instance of the same LeRobot class with random weights (``adapters/tiny``), its
environment to one that is installed by default, the budgets to a few seconds' worth. All else stays as the
recipe says. What comes out is an artefact or a LoRA of a policy that can do nothing: it shows that the
recipe runs, not that it works.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from trimtab.adapters.errors import UserError
from trimtab.recipes.cli.recipes import type_of
from trimtab.recipes.support.console import TINY
from trimtab.recipes.support.recipe_file import OPTION as CONFIG_PATH
from trimtab.recipes.support.recipe_file import file_options, kept, read_options, split_options, write_options
from trimtab.recipes.support.tiny_budget import BUDGETS, MACHINE, STEPS, merge, shrink
from trimtab.recipes.support.tiny_policy import OPTION, SERVED, demonstrations, install, made, say, serve

PATH = "--policy.path"
# What is replaced, and so not taken from the command line.
REPLACED = ("--policy.", "--env.", "--dataset.")
STATE_ENV = "metaworld_state"
TYPES = ("diffusion", "groot", "multi_task_dit", "pi0", "pi05", "smolvla", "xvla")
EXECUTED = 2  # of a chunk, where the recipe says how many


@contextmanager
def tiny(args: list[str], command: str) -> Iterator[list[str]]:
    """The arguments that run ``command`` tiny, where ``--tiny`` asks for that; else ``args``.

    Raises:
        UserError: the command has no tiny form, or the policy's type is unknown.
    """
    said, rest = _taken(args)
    if said in (None, "false") or {"-h", "--help"} & set(args):
        yield rest
        return
    if command not in TINY:
        raise UserError(OPTION, f"has no effect on {command}; {', '.join(TINY)} have a tiny form")
    with ExitStack() as stack:
        yield _tiny(stack, rest, command, None if said == "true" else said)


def _taken(args: list[str]) -> tuple[str | None, list[str]]:
    """What ``--tiny`` says (lower case), and the other arguments."""
    found, rest = None, []
    for option, value, said in split_options(args):
        if option == OPTION:
            found = value.lower() or "true"
        else:
            rest += said
    return found, rest


def _tiny(stack: ExitStack, args: list[str], command: str, kind: str | None) -> list[str]:
    from trimtab.policies.artefact import is_artefact

    named = {option: value for option, value, _ in split_options(args)}
    content = kept(file_options(args, say) or {}, command, named.get(CONFIG_PATH))
    path = named.get(PATH) or (content.get("policy") or {}).get("path")
    if command == "adapt" and named.get("--resume", "false").lower() != "false":
        return _on_run(args, Path(named.get("--output_dir", "")))
    artefact = _artefact(named, path, command)
    if artefact is not None:
        return _on_artefact(stack, args, command, artefact)
    if is_artefact(path):
        return args  # the command says what is wrong
    if path is None and kind is None:
        raise UserError(PATH, f"name a recipe with {CONFIG_PATH}, or the type with {OPTION}=TYPE")
    kind = kind or kind_of(path or "")
    known = TYPES if command == "lora" else (*TYPES, "remote")
    if kind not in known:
        raise UserError(OPTION, f"no tiny run of a '{kind}' policy; there is one of {', '.join(known)}")
    said = {name: named[f"--env.{name}"] for name in ("type", "task") if f"--env.{name}" in named}
    env = (content.get("env") or {}) | said
    stateful = env.get("type") == STATE_ENV and kind == "diffusion"
    folder, policy = made(SERVED if kind == "remote" else kind, stateful)
    world = _world(stateful, env, policy)
    if kind == "remote":
        policy = serve(stack, folder, policy)
    elif (content.get("policy") or {}).get("n_action_steps"):
        policy["n_action_steps"] = EXECUTED
    named_env = env.get("task") or env.get("type") or "no environment"
    say(
        f"tiny: a random {policy_name(kind)} in {world['type']}, in the place of {path or 'a checkpoint'} in "
        f"{named_env}; budgets of seconds"
    )
    content |= {"policy": policy, "env": world, "machine": MACHINE}
    shrink(content, command)
    rollouts = named.get("--from_rollouts", "").lower() == "true"
    if command == "lora" and not rollouts:
        content |= {"dataset": demonstrations(folder, policy, world), "from_rollouts": False}
    return _with_file(stack, content, args)


def policy_name(kind: str) -> str:
    return f"{SERVED} on a policy server" if kind == "remote" else kind


def kind_of(path: str) -> str:
    """The type of the policy that ``path`` names, as far as that can be told without fetching it.

    Raises:
        UserError: it cannot.
    """
    from trimtab.adapters.checkpoint.files import CONFIG
    from trimtab.adapters.checkpoint.folder import is_server

    if is_server(path):
        return "remote"
    for folder in (Path(path).expanduser(), Path(path).expanduser() / "pretrained_model"):
        if (folder / CONFIG).is_file():
            return str((read_options(folder / CONFIG) or {}).get("type"))
    kind = type_of(path)
    if kind is None:
        raise UserError(
            OPTION, f"cannot tell the type of {path}; say it with {OPTION}=TYPE ({', '.join(TYPES)})"
        )
    return kind


def _artefact(named: dict[str, str], path: str | None, command: str) -> Path | None:
    """The artefact that the command works on, where there is one: its base has been made already."""
    from trimtab.policies.artefact import is_artefact

    if command == "export":
        run = Path(named.get("--run", "")).expanduser()
        return next((f for f in (run / "artefact", run) if is_artefact(str(f))), run)
    if command == "eval" and is_artefact(path):
        return Path(path or "").expanduser()
    return None


def _on_run(args: list[str], output: Path) -> list[str]:
    """Go on with a tiny run: its config.json holds what it was made of."""
    base = (read_options(output / "config.json") or {}).get("policy") or {}
    kind = kind_of(base["path"]) if base.get("path") else ""
    if kind == "remote":
        raise UserError(OPTION, "the policy server of a tiny run ended with it; begin the run anew")
    install(kind)
    return args


def _on_artefact(stack: ExitStack, args: list[str], command: str, artefact: Path) -> list[str]:
    """Evaluate or export an artefact of a tiny run: its base again, on a server again where it was on one."""
    from trimtab.adapters.checkpoint.folder import is_server

    saved = read_options(artefact / "config.json") or {}
    base = saved.get("base") or {}
    if base.get("policy_type") in ("pi0", "pi05"):
        install(base["policy_type"])
    again = []
    if is_server(base.get("path")):
        folder, policy = made(SERVED, False)
        again = [f"--policy.base_path={serve(stack, folder, policy)['path']}"]
    if command == "export":
        return [*args, *again]
    env = (saved.get("training") or {}).get("env") or {}
    loading = {"path": str(artefact), "device": "cpu"}
    content: dict[str, Any] = {"env": env, "policy": loading, "machine": MACHINE}
    merge(content, BUDGETS[command])
    return [*_with_file(stack, content, args), *again]


def _with_file(stack: ExitStack, content: dict[str, Any], args: list[str]) -> list[str]:
    """Arguments that name a file with ``content``; of the command line, what it does not replace."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    rest: list[str] = []
    for option, _, said in split_options(args):
        if option != CONFIG_PATH and not option.startswith(REPLACED):
            rest += said
    return [f"{CONFIG_PATH}={write_options(folder / 'tiny.yaml', content)}", *rest]


def _world(stateful: bool, env: dict[str, Any], policy: dict[str, Any]) -> dict[str, Any]:
    """The environment of a tiny run."""
    if stateful:
        task = env.get("task") or "button-press-topdown-v3"
        return {"type": STATE_ENV, "task": task, "episode_length": STEPS}
    return {"type": "pusht", "obs_type": "pixels_agent_pos", "episode_length": STEPS}
