"""``--tiny=true``: a recipe on a random tiny policy of the same type, so that all of it runs anywhere.

The checkpoint gives way to an instance of the same LeRobot class with random weights (``adapters/tiny``), its
environment to one that is installed by default, the budgets to a few seconds' worth. All else stays as the
recipe says. What comes out is an artefact or a LoRA of a policy that can do nothing: it shows that the
recipe runs, not that it works.
"""

from __future__ import annotations

import copy
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from trimtab.adapters.checkpoint.files import CONFIG
from trimtab.adapters.checkpoint.folder import is_server
from trimtab.adapters.errors import UserError
from trimtab.policies.artefact import is_artefact
from trimtab.recipes.cli import COMMANDS
from trimtab.recipes.cli.recipes import type_of
from trimtab.recipes.support.console import say
from trimtab.recipes.support.option_dicts import CONFIG_PATH, Options, merge, value_at
from trimtab.recipes.support.tiny_budget import BUDGETS, MACHINE, STEPS, shrink
from trimtab.recipes.support.tiny_policy import OPTION, SERVED, demonstrations, install, made, serve
from trimtab.rl.envs.hooks import tiny_form

REPLACED = ("policy", "env", "dataset")  # whatever the command line says of them
TYPES = ("diffusion", "groot", "multi_task_dit", "pi0", "pi05", "smolvla", "xvla")
EXECUTED = 2  # of a chunk, where the recipe says how many


def tiny_options(stack: ExitStack, values: Options, given: Options, command: str, kind: str) -> Options:
    """The options of ``command`` run tiny.

    Args:
        stack: closes what is started.
        values: the options of the run that is asked for.
        given: those of them that stand on the command line, which win over the tiny ones.
        command: its name.
        kind: type of the policy; ``true`` for that of its checkpoint.

    Raises:
        UserError: the command has no tiny form, or the policy's type is unknown.
    """
    if not COMMANDS[command].tiny:
        able = ", ".join(name for name, one in COMMANDS.items() if one.tiny)
        raise UserError(OPTION, f"has no effect on {command}; {able} have a tiny form")
    path = value_at(values, "policy.path")
    if values.get("resume") is True:  # a tiny run's config.json holds what it was made of
        kind = kind_of(path) if path else ""
        if kind == "remote":
            raise UserError(OPTION, "the policy server of a tiny run ended with it; begin the run anew")
        install(kind)
        return values
    if command == "export":
        run = Path(str(values.get("run", ""))).expanduser()
        artefact = next((folder for folder in (run / "artefact", run) if is_artefact(str(folder))), run)
        return merge(values, _of_artefact(stack, artefact))
    own = {name: value for name, value in given.items() if name not in REPLACED}
    if is_artefact(path):
        if command != "eval":
            return values  # the command says what is wrong
        artefact = Path(path).expanduser()
        env = value_at(_read(artefact), "training.env") or {}
        base = merge({"policy": {"path": path, "device": "cpu"}}, _of_artefact(stack, artefact))
        return merge({**base, "env": env, "machine": MACHINE, **BUDGETS[command]}, own)
    if path is None and kind == "true":
        raise UserError("--policy.path", f"name a recipe with {CONFIG_PATH}, or the type with {OPTION}=TYPE")
    return merge(_of_recipe(stack, values, given, command, kind_of(path) if kind == "true" else kind), own)


def _of_recipe(stack: ExitStack, values: Options, given: Options, command: str, kind: str) -> Options:
    """``values`` with a tiny policy of type ``kind``, an environment for it, and budgets of seconds."""
    known = TYPES if command == "lora" else (*TYPES, "remote")
    if kind not in known:
        raise UserError(OPTION, f"no tiny run of a '{kind}' policy; there is one of {', '.join(known)}")
    values = copy.deepcopy(values)
    path, env = value_at(values, "policy.path"), values.get("env") or {}
    own = tiny_form(env, STEPS) if kind == "diffusion" else None
    folder, policy = made(SERVED if kind == "remote" else kind, own)
    if kind == "remote":
        policy = serve(stack, folder, policy)
    elif value_at(values, "policy.n_action_steps"):
        policy["n_action_steps"] = EXECUTED
    world = {"type": "pusht", "obs_type": "pixels_agent_pos", "episode_length": STEPS}
    if own is not None:
        world = {"type": own.type, "task": own.task, "episode_length": STEPS}
    name = f"{SERVED} on a policy server" if kind == "remote" else kind
    say(
        f"tiny: a random {name} in {world['type']}, in the place of {path or 'a checkpoint'} in "
        f"{env.get('task') or env.get('type') or 'no environment'}; budgets of seconds"
    )
    values |= {"policy": policy, "env": world, "machine": MACHINE}
    shrink(values, command)
    if command == "lora" and str(given.get("from_rollouts")).lower() != "true":
        values |= {"dataset": demonstrations(folder, policy, world), "from_rollouts": False}
    return values


def kind_of(path: str) -> str:
    """The type of the policy that ``path`` names, as far as that can be told without fetching it.

    Raises:
        UserError: it cannot.
    """
    if is_server(path):
        return "remote"
    for folder in (Path(path).expanduser(), Path(path).expanduser() / "pretrained_model"):
        if (folder / CONFIG).is_file():
            return str(_read(folder).get("type"))
    kind = type_of(path)
    if kind is None:
        raise UserError(
            OPTION, f"cannot tell the type of {path}; say it with {OPTION}=TYPE ({', '.join(TYPES)})"
        )
    return kind


def _of_artefact(stack: ExitStack, artefact: Path) -> Options:
    """What loads the base of a tiny run's artefact: on a server again where it was on one."""
    base = _read(artefact).get("base") or {}
    install(str(base.get("policy_type")))
    if not is_server(base.get("path")):
        return {}
    return {"policy": {"base_path": serve(stack, *made(SERVED))["path"]}}


def _read(folder: Path) -> dict[str, Any]:
    """The config.json of a folder; empty where there is none that can be read, which loading then says."""
    try:
        content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
