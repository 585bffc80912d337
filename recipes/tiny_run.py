"""``--tiny=true``: a recipe on a random tiny policy of the same type, so that all of it runs anywhere.

The checkpoint gives way to an instance of the same LeRobot class with random weights (``recipes/tiny``), its
environment to one that is installed by default, the budgets to a few seconds' worth. All else stays as the
recipe says. What comes out is an artefact or a LoRA of a policy that can do nothing: it shows that the
recipe runs, not that it works.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from trimtab.adapters.errors import UserError
from trimtab.recipes.catalogue import type_of
from trimtab.recipes.compare.from_recipe import FINE_TUNED, LEARN_NOTHING_NEW
from trimtab.recipes.console import TINY
from trimtab.recipes.recipe_file import OPTION as CONFIG_PATH
from trimtab.recipes.recipe_file import kept, read_options, split_options, write_options

OPTION = "--tiny"
PATH = "--policy.path"
# What is replaced, and so not taken from the command line.
REPLACED = ("--policy.", "--env.", "--dataset.")
STATE_ENV = "metaworld_state"
TYPES = ("diffusion", "groot", "multi_task_dit", "pi0", "pi05", "smolvla", "xvla")
SERVED = "pi05"  # what runs on the tiny policy server
MADE = "tiny.json"  # how to load what is in the cache; written last
STEPS = 24  # of an episode
EXECUTED = 2  # of a chunk, where the recipe says how many

EVAL = {"n_episodes": 2, "batch_size": 2, "constant_candidates": 1, "constant_episodes": 1, "videos": 1}
MACHINE = {"workers": 0, "threads": 1}
BUDGETS: dict[str, dict[str, Any]] = {
    "adapt": {
        "num_envs": 2,
        "train": {"env_steps": 64, "log_every": 32},
        "eval": EVAL,
    },
    "probe": {"observations": 2, "noises": 4, "repeats": 1, "eval": {**EVAL, "videos": 0}},
    "eval": {"eval": EVAL},
    "lora": {
        **{"num_envs": 2, "env_steps": 48, "rounds": 1},
        "eval": {"n_episodes": 1, "batch_size": 1, "videos": 1},
    },
    "compare": {
        **{"tasks": "", "seeds": "1", "env_steps": 64, "grid": 32, "num_envs": 2, "batch_size": 2},
        **{"n_episodes": 2, "final_episodes": 2, "other_episodes": 0, "videos": 1, "isolate": False},
    },
}
PACE = {"first_update": 4, "warmup_transitions": 4}
TUNING = {"steps": 2, "batch_size": 2, "num_workers": 0}
NARROW = {"hidden": 16}
# Caps on what a recipe says of its algorithm and of its images.
RL = {"batch_size": 8, "num_candidates": 2, "target_candidates": 2}


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
    content = kept(read_options(named.get(CONFIG_PATH)) or {}, command, named.get(CONFIG_PATH))
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
        policy = _serve(stack, folder, policy)
    elif (content.get("policy") or {}).get("n_action_steps"):
        policy["n_action_steps"] = EXECUTED
    named_env = env.get("task") or env.get("type") or "no environment"
    say(
        f"tiny: a random {policy_name(kind)} in {world['type']}, in the place of {path or 'a checkpoint'} in "
        f"{named_env}; budgets of seconds"
    )
    content |= {"policy": policy, "env": world, "machine": MACHINE}
    _shrink(content, command)
    rollouts = named.get("--from_rollouts", "").lower() == "true"
    if command == "lora" and not rollouts:
        content |= {"dataset": _demonstrations(folder, policy, world), "from_rollouts": False}
    return _with_file(stack, content, args)


def say(text: str) -> None:
    """Print on the first process of an ``accelerate launch``."""
    if os.environ.get("RANK", "0") == "0":
        print(text)


def policy_name(kind: str) -> str:
    return f"{SERVED} on a policy server" if kind == "remote" else kind


def kind_of(path: str) -> str:
    """The type of the policy that ``path`` names, as far as that can be told without fetching it.

    Raises:
        UserError: it cannot.
    """
    from trimtab.adapters.files import CONFIG, is_server

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
    _install(kind)
    return args


def _on_artefact(stack: ExitStack, args: list[str], command: str, artefact: Path) -> list[str]:
    """Evaluate or export an artefact of a tiny run: its base again, on a server again where it was on one."""
    from trimtab.adapters.files import is_server

    saved = read_options(artefact / "config.json") or {}
    base = saved.get("base") or {}
    if base.get("policy_type") in ("pi0", "pi05"):
        _install(base["policy_type"])
    again = []
    if is_server(base.get("path")):
        folder, policy = made(SERVED, False)
        again = [f"--policy.base_path={_serve(stack, folder, policy)['path']}"]
    if command == "export":
        return [*args, *again]
    env = (saved.get("training") or {}).get("env") or {}
    loading = {"path": str(artefact), "device": "cpu"}
    content: dict[str, Any] = {"env": env, "policy": loading, "machine": MACHINE}
    _merge(content, BUDGETS[command])
    return [*_with_file(stack, content, args), *again]


def _with_file(stack: ExitStack, content: dict[str, Any], args: list[str]) -> list[str]:
    """Arguments that name a file with ``content``; of the command line, what it does not replace."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    rest: list[str] = []
    for option, _, said in split_options(args):
        if option != CONFIG_PATH and not option.startswith(REPLACED):
            rest += said
    return [f"{CONFIG_PATH}={write_options(folder / 'tiny.yaml', content)}", *rest]


def _merge(content: dict[str, Any], changes: dict[str, Any]) -> None:
    for name, value in changes.items():
        if isinstance(value, dict):
            content[name] = dict(content.get(name) or {})
            _merge(content[name], value)
        else:
            content[name] = value


def _shrink(content: dict[str, Any], command: str) -> None:
    """Budgets and sizes of seconds, in the place of the recipe's."""
    _merge(content, BUDGETS[command])
    if command == "lora":
        _shrink_tuning(content)
    if command == "adapt":
        _shrink_steering(content)
        content.pop("demos", None)
    if command == "compare":
        small = _small_methods(content)
        settings = {name: (content.get("settings") or {}).get(name) or {} for name in small}
        for name in {"steered", "residual"} & set(small):
            _shrink_steering(settings[name])
        if FINE_TUNED in small:
            _shrink_tuning(settings[FINE_TUNED].setdefault("tuning", {}))
        content |= {"methods": ",".join(small), "settings": settings}
    observe = content.get("observe") or {}
    observe.pop("cameras", None)  # the environment has one, under another name
    if "images" in (observe.get("inputs") or ()):
        observe["image_size"] = 32


def _small_methods(content: dict[str, Any]) -> list[str]:
    """Of the comparison's methods those that a few chunks suffice for; what is no method is left in."""
    from trimtab.adapters.files import is_server
    from trimtab.recipes.compare.methods import METHODS

    known = [*LEARN_NOTHING_NEW, *(() if is_server(content["policy"]["path"]) else (FINE_TUNED,))]
    names = [name.strip() for name in content.get("methods", ",".join(known)).split(",")]
    return [name for name in names if name in known or name not in METHODS]


def _shrink_steering(content: dict[str, Any]) -> None:
    """A pace and networks for a few chunks; ``content`` has ``rl`` and ``train``."""
    train, rl = content.setdefault("train", {}), content.get("rl") or {}
    train.pop("warm_start", None)
    pace = train.get("updates_per_transition")
    train |= PACE | {"updates_per_transition": min(2.0, pace or 2.0)}
    content["train"] = train
    if rl.get("type") and rl["type"] != "golden_ticket":
        for name, most in RL.items():
            if name == "batch_size" or rl["type"] in ("best_of_n", "dsrl_na"):
                rl[name] = min(most, rl.get(name, most))
        _merge(rl, {"actor": NARROW, "critic": NARROW})
        content["rl"] = rl


def _shrink_tuning(content: dict[str, Any]) -> None:
    """A few steps of a narrow LoRA."""
    content |= TUNING
    peft = content.setdefault("peft", {})
    peft["r"] = min(4, peft.get("r", 4))


def _world(stateful: bool, env: dict[str, Any], policy: dict[str, Any]) -> dict[str, Any]:
    """The environment of a tiny run."""
    if stateful:
        task = env.get("task") or "button-press-topdown-v3"
        return {"type": STATE_ENV, "task": task, "episode_length": STEPS}
    return {"type": "pusht", "obs_type": "pixels_agent_pos", "episode_length": STEPS}


# Making the policy.


def made(kind: str, stateful: bool) -> tuple[Path, dict[str, Any]]:
    """A random tiny policy for the environment of a tiny run, made now if the cache lacks it.

    Args:
        kind: policy type.
        stateful: for ``metaworld_state``, else for pusht's camera.

    Returns:
        its folder, and the options under ``policy`` that load it.
    """
    import shutil
    from dataclasses import asdict

    from filelock import FileLock  # torch needs it, too

    from trimtab.adapters.loading import quietly
    from trimtab.recipes.demo import default_cache
    from trimtab.recipes.tiny import make_tiny

    cache = default_cache() / "tiny"
    folder = cache / f"{kind}-{'state' if stateful else 'pixels'}-{_version()}"
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(OPTION, f"cannot write to {cache} ({error.strerror}); set TRIMTAB_CACHE") from None
    with FileLock(f"{folder}.lock"):
        if not (folder / MADE).is_file():
            shutil.rmtree(folder, ignore_errors=True)
            fields, renamed = _features(kind, stateful)
            with quietly():
                options = asdict(make_tiny(kind, folder, **fields))
            names = ("path", "device", "tokenizer", "backbone")
            loading = {name: options[name] for name in names if options[name]} | {"rename_map": renamed}
            (folder / MADE).write_text(json.dumps(loading, indent=2) + "\n", encoding="utf-8")
    _install(kind)
    return folder, json.loads((folder / MADE).read_text(encoding="utf-8"))


def _version() -> str:
    """Changes with what decides what a tiny policy is."""
    import hashlib

    import lerobot
    import torch

    import trimtab.recipes.tiny as builders

    digest = hashlib.sha256(f"{lerobot.__version__} {torch.__version__}".encode())
    for source in (*sorted(Path(builders.__file__).parent.glob("*.py")), Path(__file__)):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:12]


def _features(kind: str, stateful: bool) -> tuple[dict[str, Any], dict[str, str]]:
    """Fields of the tiny policy's config that make it fit the environment; and what is to be renamed."""
    from lerobot.configs import FeatureType, PolicyFeature

    from trimtab.recipes.tiny.parts import camera_features

    if stateful:
        inputs = {
            "observation.state": PolicyFeature(FeatureType.STATE, (4,)),
            "observation.environment_state": PolicyFeature(FeatureType.ENV, (85,)),
        }
        outputs = {"action": PolicyFeature(FeatureType.ACTION, (4,))}
        return {"input_features": inputs, "output_features": outputs}, {}
    features: dict[str, Any] = camera_features(1, 96, state_dim=2, action_dim=2)
    if kind == "diffusion":  # its ResNet18 is as large as the published one's
        features["resize_shape"] = (32, 32)
    if kind != "xvla":
        return features, {}
    # X-VLA's image steps look for cameras below this prefix.
    own, new = "observation.image", "observation.images.camera1"
    features["input_features"][new] = features["input_features"].pop(own)
    return {"cameras": 1, **features}, {own: new}


def _install(kind: str) -> None:
    """Let this process load a tiny pi0 or pi05, whose sizes LeRobot fixes in its code."""
    if kind in ("pi0", "pi05"):
        from trimtab.recipes.tiny.pi0 import install

        install(kind)


def _serve(stack: ExitStack, folder: Path, policy: dict[str, Any]) -> dict[str, Any]:
    """Start a policy server with the tiny policy; return the options that steer what it serves."""
    from trimtab.recipes.tiny_server import KEYS, serving

    url = stack.enter_context(serving(policy))
    dims = {"observation.state": 2}
    remote = {"keys": KEYS, "dims": dims, "image_size": 96, "n_action_steps": 4}
    return {"path": url, "device": "cpu", "remote": remote}


def _demonstrations(folder: Path, policy: dict[str, Any], world: dict[str, Any]) -> dict[str, Any]:
    """A LeRobotDataset for ``lora``: a few recorded episodes of the tiny policy, whether they succeed or not.

    A random policy never succeeds, so that there is nothing to be learnt from its successes.
    """
    import draccus
    from filelock import FileLock
    from lerobot.envs.configs import EnvConfig

    from trimtab.adapters import PolicyConfig, load_adapter
    from trimtab.recipes.lora_data import REPO_ID, Recorder
    from trimtab.recipes.lora_rollouts import Rollouts
    from trimtab.recipes.session import EpisodesConfig, MachineConfig, Session

    root = folder / f"demonstrations-{world['type']}"
    with FileLock(f"{root}.lock"):
        if not (folder / "demonstrations.json").is_file():
            adapter = load_adapter(draccus.decode(PolicyConfig, policy))
            session = Session(
                adapter, draccus.decode(EnvConfig, world), EpisodesConfig(), MachineConfig(**MACHINE)
            )
            with session.environments(1, keep_seen=True) as vec:
                episodes = Rollouts(session.runner, vec, session.own_noise, 0).collect(STEPS, progress=False)
            Recorder(root, session.env.fps).add(episodes)
            (folder / "demonstrations.json").write_text("{}\n", encoding="utf-8")
    say("tiny: lora learns from a recorded episode of the random policy, which never succeeds")
    return {"repo_id": REPO_ID, "root": str(root)}
