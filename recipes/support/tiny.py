"""``--tiny=true``: a recipe on a random tiny policy of the same type, so that all of it runs anywhere.

The checkpoint gives way to an instance of the same LeRobot class with random weights (``adapters/tiny``), its
environment to one that is installed by default, the budgets to a few seconds' worth (``tiny.yaml``). All else
stays as the recipe says. What comes out is an artefact or a LoRA of a policy that can do nothing: it shows
that the recipe runs, not that it works.
"""

import shutil
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import draccus
from filelock import FileLock
from lerobot.envs.configs import EnvConfig
from lerobot.utils.constants import ACTION

from trimtab.adapters import PolicyConfig, UserError, load_adapter
from trimtab.adapters.checkpoint.files import CONFIG
from trimtab.adapters.checkpoint.folder import is_server
from trimtab.adapters.loading import quietly
from trimtab.adapters.tiny import make_tiny
from trimtab.adapters.tiny.parts import camera_features
from trimtab.policies.artefact import is_artefact
from trimtab.recipes.cli import COMMANDS
from trimtab.recipes.cli.recipes import type_of
from trimtab.recipes.compare.config import METHODS
from trimtab.recipes.compare.from_recipe import FINE_TUNED, LEARN_NOTHING_NEW
from trimtab.recipes.finetune.data import REPO_ID, Recorder
from trimtab.recipes.finetune.rollouts import Rollouts
from trimtab.recipes.support.console import default_cache, say
from trimtab.recipes.support.option_dicts import (
    CONFIG_PATH,
    Options,
    filled,
    merge,
    read_options,
    value_at,
)
from trimtab.recipes.support.reporting import read_json, write_json
from trimtab.recipes.support.session import Session
from trimtab.recipes.support.shared_configs import EpisodesConfig, MachineConfig
from trimtab.rl.algorithms import AlgorithmConfig
from trimtab.rl.envs.hooks import tiny_form

OPTION = "--tiny"
REPLACED = ("policy", "env", "dataset")  # whatever the command line says of them
TYPES = ("diffusion", "groot", "multi_task_dit", "pi0", "pi05", "smolvla", "xvla")
SERVED = "pi05"  # what runs on the tiny policy server
MADE = "tiny.json"  # how to load what is in the cache; written last
SIZES = read_options(Path(__file__).with_suffix(".yaml"))
MACHINE = {"workers": 0, "threads": 1}
EXECUTED = 2  # steps of a chunk, where the recipe says how many
DENOISING = {"num_inference_steps": 2}
STEPS = 8  # of an episode
SIDE = 96  # pixels of pusht's camera


def tiny_options(stack: ExitStack, values: Options, given: Options, command: str, kind: str) -> Options:
    """The options of ``command`` run tiny, where ``values`` are asked for.

    Args:
        stack: closes what is started.
        given: those of them that stand on the command line, which win over the tiny ones.
        kind: type of the policy; ``true`` for that of its checkpoint.

    Raises:
        UserError: the command has no tiny form, or the policy's type is unknown.
    """
    if not COMMANDS[command].tiny:
        able = ", ".join(name for name, one in COMMANDS.items() if one.tiny)
        raise UserError(OPTION, f"has no effect on {command}; {able} have a tiny form")
    values = filled(values, str(values.get("tasks")).split(",")[0].strip())
    path = value_at(values, "policy.path")
    if values.get("resume") is True:  # a tiny run's config.json holds what it was made of
        kind = kind_of(path) if path else ""
        if kind == "remote":
            raise UserError(OPTION, "the policy server of a tiny run ended with it; begin the run anew")
        install(kind)
        return values
    if command == "export":
        run = Path(str(values.get("run", ""))).expanduser()
        return merge(values, _of_artefact(stack, run / "artefact" if (run / "artefact").is_dir() else run))
    own = {name: value for name, value in given.items() if name not in REPLACED}
    if is_artefact(path):
        if command != "eval":
            return values  # the command says what is wrong
        artefact = Path(path).expanduser()
        policy = merge({"policy": {"path": path, "device": "cpu"}}, _of_artefact(stack, artefact))
        env = value_at(_config(artefact), "training.env") or {}
        return merge({**policy, "env": env, "machine": MACHINE, **SIZES["budgets"][command]}, own)
    if path is None and kind == "true":
        raise UserError("--policy.path", f"name a recipe with {CONFIG_PATH}, or the type with {OPTION}=TYPE")
    kind = kind_of(path) if kind == "true" else kind
    known = TYPES if command == "lora" else (*TYPES, "remote")
    if kind not in known:
        raise UserError(OPTION, f"no tiny run of a '{kind}' policy; there is one of {', '.join(known)}")
    successes = str(given.get("from_rollouts")).lower() == "true"
    return merge(_of_recipe(stack, deepcopy(values), command, kind, successes), own)


def _of_recipe(stack: ExitStack, values: Options, command: str, kind: str, successes: bool) -> Options:
    """``values`` with a tiny policy of type ``kind``, an environment for it, and budgets of seconds."""
    path, env = value_at(values, "policy.path"), values.get("env") or {}
    own = tiny_form(env, STEPS) if kind == "diffusion" else None
    folder, policy = made(SERVED if kind == "remote" else kind, own)
    name = kind
    if kind == "remote":
        name, policy = f"{SERVED} on a policy server", serve(stack, policy)
    elif value_at(values, "policy.n_action_steps"):
        policy["n_action_steps"] = EXECUTED
    world: dict[str, Any] = {"type": "pusht", "obs_type": "pixels_agent_pos", "episode_length": STEPS}
    world |= {"observation_height": SIDE, "observation_width": SIDE}
    if own is not None:
        world = {"type": own.type, "task": own.task, "episode_length": STEPS}
    say(
        f"tiny: a random {name} in {world['type']}, in the place of {path or 'a checkpoint'} in "
        f"{env.get('task') or env.get('type') or 'no environment'}; budgets of seconds"
    )
    values |= {"policy": policy, "env": world, "machine": MACHINE}
    shrink(values, command)
    if command == "lora" and not successes:
        values |= {"dataset": demonstrations(folder, policy, world), "from_rollouts": False}
    return values


def kind_of(path: str) -> str:
    """The type of the policy that ``path`` names, told without fetching it, or a ``UserError``."""
    if is_server(path):
        return "remote"
    for folder in (Path(path).expanduser(), Path(path).expanduser() / "pretrained_model"):
        if (folder / CONFIG).is_file():
            return str(_config(folder).get("type"))
    kind = type_of(path)
    if kind is None:
        raise UserError(
            OPTION, f"cannot tell the type of {path}; say it with {OPTION}=TYPE ({', '.join(TYPES)})"
        )
    return kind


def _of_artefact(stack: ExitStack, artefact: Path) -> Options:
    """What loads the base of a tiny run's artefact: on a server again where it was on one."""
    base = _config(artefact).get("base") or {}
    install(str(base.get("policy_type")))
    if not is_server(base.get("path")):
        return {}
    return {"policy": {"base_path": serve(stack, made(SERVED)[1])["path"]}}


def _config(folder: Path) -> dict[str, Any]:
    """The config.json of a folder; empty where there is none that can be read, which loading then says."""
    try:
        return read_options(folder / CONFIG)
    except UserError:
        return {}


def shrink(content: Options, command: str) -> None:
    """Budgets and sizes of seconds, in the place of the recipe's."""
    content |= merge(content, SIZES["budgets"][command])
    if command == "adapt":
        content.pop("demos", None)
        _shrink_steering(content)
    if command == "lora":
        _shrink_tuning(content)
    if command == "compare":
        # The methods that a few chunks suffice for; what is no method is left in, to be refused.
        known = [*LEARN_NOTHING_NEW, *(() if is_server(content["policy"]["path"]) else (FINE_TUNED,))]
        names = [name.strip() for name in content.get("methods", ",".join(known)).split(",")]
        names = [name for name in names if name in known or name not in METHODS]
        settings = {name: (content.get("settings") or {}).get(name) or {} for name in names}
        for name in {"steered", "residual"} & set(names):
            settings[name] = {"rl": METHODS[name]["rl"], **settings[name]}
            _shrink_steering(settings[name])
        if FINE_TUNED in names:
            _shrink_tuning(settings[FINE_TUNED].setdefault("tuning", {}))
        content |= {"methods": ",".join(names), "settings": settings}
    observe = content.get("observe") or {}
    observe.pop("cameras", None)  # the environment has one, under another name
    if "images" in (observe.get("inputs") or ()):
        observe["image_size"] = 32


def _shrink_steering(part: Options) -> None:
    """A pace and networks for a few chunks."""
    part["train"] = {**(part.get("train") or {}), **SIZES["train"]}
    part["train"].pop("warm_start", None)
    rl = part.get("rl") or {}
    if algorithm := AlgorithmConfig.get_known_choices().get(str(rl.get("type"))):
        names = {field.name for field in fields(algorithm)}
        part["rl"] = merge(rl, {name: value for name, value in SIZES["rl"].items() if name in names})


def _shrink_tuning(part: Options) -> None:
    peft = part.get("peft") or {}
    part |= {**SIZES["tuning"], "peft": {**peft, "r": min(4, peft.get("r", 4))}}


def made(kind: str, env: EnvConfig | None = None) -> tuple[Path, dict[str, Any]]:
    """A random tiny policy, made now if the cache lacks it: its folder, and the options that load it.

    ``env`` gives it its state; ``None`` is for pusht's camera.
    """
    cache = default_cache() / "tiny"
    versions = (version(name) for name in ("lerobot_policy_trimtab", "lerobot", "torch"))
    folder = cache / "-".join((kind, env.type if env else "pixels", *versions))
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(OPTION, f"cannot write to {cache} ({error.strerror}); set TRIMTAB_CACHE") from None
    with FileLock(f"{folder}.lock"):
        if not (folder / MADE).is_file():
            shutil.rmtree(folder, ignore_errors=True)
            features, renamed = _features(kind, env)
            with quietly():
                options = asdict(make_tiny(kind, folder, **features))
            names = ("path", "device", "tokenizer", "backbone")
            loading = {name: options[name] for name in names if options[name]}
            write_json(folder / MADE, {**loading, **DENOISING, "rename_map": renamed})
    install(kind)
    return folder, read_json(folder / MADE)


def _features(kind: str, env: EnvConfig | None) -> tuple[dict[str, Any], dict[str, str]]:
    """Fields of the tiny policy's config that make it fit the environment; and what is to be renamed."""
    if env is not None:
        inputs = {env.features_map[name]: feature for name, feature in env.features.items()}
        return {"output_features": {ACTION: inputs.pop(ACTION)}, "input_features": inputs}, {}
    features: dict[str, Any] = camera_features(1, SIDE, state_dim=2, action_dim=2)
    if kind == "diffusion":  # its ResNet18 is as large as the published one's
        features["resize_shape"] = (32, 32)
    if kind != "xvla":
        return features, {}
    # X-VLA's image steps look for cameras below this prefix.
    own, new = "observation.image", "observation.images.camera1"
    features["input_features"][new] = features["input_features"].pop(own)
    return {"cameras": 1, **features}, {own: new}


def install(kind: str) -> None:
    """Let this process load a tiny pi0 or pi05, whose sizes LeRobot fixes in its code."""
    if kind in ("pi0", "pi05"):
        from trimtab.adapters.tiny.pi0 import install

        install(kind)


def serve(stack: ExitStack, policy: dict[str, Any]) -> dict[str, Any]:
    """Start a policy server with the tiny policy; return the options that steer what it serves."""
    from trimtab.adapters.tiny.server import KEYS, serving

    return {
        "path": stack.enter_context(serving(policy)),
        "device": "cpu",
        "remote": {**SIZES["remote"], "keys": KEYS},
    }


def demonstrations(folder: Path, policy: dict[str, Any], world: dict[str, Any]) -> dict[str, Any]:
    """A LeRobotDataset for ``lora``: a few recorded episodes of the tiny policy, whether they succeed or not.

    A random policy never succeeds, so that there is nothing to be learnt from its successes.
    """
    root, done = folder / f"demonstrations-{world['type']}", folder / "demonstrations.json"
    with FileLock(f"{root}.lock"):
        if not done.is_file():
            adapter = load_adapter(draccus.decode(PolicyConfig, policy))
            env, machine = draccus.decode(EnvConfig, world), MachineConfig(**MACHINE)
            session = Session(adapter, env, EpisodesConfig(), machine)
            with session.environments(1, keep_seen=True) as vec:
                episodes = Rollouts(session.runner, vec, session.own_noise, 0).collect(STEPS, progress=False)
            Recorder(root, session.env.fps).add(episode.frames for episode in episodes)
            write_json(done, {})
    say("tiny: lora learns from a recorded episode of the random policy, which never succeeds")
    return {"repo_id": REPO_ID, "root": str(root)}
