"""The random tiny policy of a tiny run, with what serves it and its demonstrations."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lerobot.envs.configs import EnvConfig
from lerobot.utils.constants import ACTION

from trimtab.adapters.errors import UserError
from trimtab.recipes.support.console import say
from trimtab.recipes.support.tiny_budget import MACHINE, STEPS

OPTION = "--tiny"
SERVED = "pi05"  # what runs on the tiny policy server
MADE = "tiny.json"  # how to load what is in the cache; written last


def made(kind: str, env: EnvConfig | None = None) -> tuple[Path, dict[str, Any]]:
    """A random tiny policy for the environment of a tiny run, made now if the cache lacks it.

    Args:
        kind: policy type.
        env: the environment, which gives its state; ``None`` for pusht's camera.

    Returns:
        its folder, and the options under ``policy`` that load it.
    """
    import shutil
    from dataclasses import asdict

    from filelock import FileLock  # torch needs it, too

    from trimtab.adapters.loading import quietly
    from trimtab.adapters.tiny import make_tiny
    from trimtab.recipes.cli.demo import default_cache

    cache = default_cache() / "tiny"
    folder = cache / f"{kind}-{env.type if env else 'pixels'}-{_version()}"
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(OPTION, f"cannot write to {cache} ({error.strerror}); set TRIMTAB_CACHE") from None
    with FileLock(f"{folder}.lock"):
        if not (folder / MADE).is_file():
            shutil.rmtree(folder, ignore_errors=True)
            fields, renamed = _features(kind, env)
            with quietly():
                options = asdict(make_tiny(kind, folder, **fields))
            names = ("path", "device", "tokenizer", "backbone")
            loading = {name: options[name] for name in names if options[name]} | {"rename_map": renamed}
            (folder / MADE).write_text(json.dumps(loading, indent=2) + "\n", encoding="utf-8")
    install(kind)
    return folder, json.loads((folder / MADE).read_text(encoding="utf-8"))


def _version() -> str:
    """Changes with what decides what a tiny policy is."""
    import hashlib

    import lerobot
    import torch

    import trimtab.adapters.tiny as builders

    digest = hashlib.sha256(f"{lerobot.__version__} {torch.__version__}".encode())
    for source in (*sorted(Path(builders.__file__).parent.glob("*.[pj]*")), Path(__file__)):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:12]


def _features(kind: str, env: EnvConfig | None) -> tuple[dict[str, Any], dict[str, str]]:
    """Fields of the tiny policy's config that make it fit the environment; and what is to be renamed."""
    from trimtab.adapters.tiny.parts import camera_features

    if env is not None:
        inputs = {env.features_map[name]: feature for name, feature in env.features.items()}
        return {"output_features": {ACTION: inputs.pop(ACTION)}, "input_features": inputs}, {}
    features: dict[str, Any] = camera_features(1, 96, state_dim=2, action_dim=2)
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


def serve(stack: ExitStack, folder: Path, policy: dict[str, Any]) -> dict[str, Any]:
    """Start a policy server with the tiny policy; return the options that steer what it serves."""
    from trimtab.adapters.tiny.server import KEYS, serving

    url = stack.enter_context(serving(policy))
    dims = {"observation.state": 2}
    remote = {"keys": KEYS, "dims": dims, "image_size": 96, "n_action_steps": 4}
    return {"path": url, "device": "cpu", "remote": remote}


def demonstrations(folder: Path, policy: dict[str, Any], world: dict[str, Any]) -> dict[str, Any]:
    """A LeRobotDataset for ``lora``: a few recorded episodes of the tiny policy, whether they succeed or not.

    A random policy never succeeds, so that there is nothing to be learnt from its successes.
    """
    import draccus
    from filelock import FileLock

    from trimtab.adapters import PolicyConfig, load_adapter
    from trimtab.recipes.finetune.data import REPO_ID, Recorder
    from trimtab.recipes.finetune.rollouts import Rollouts
    from trimtab.recipes.support.session import Session
    from trimtab.recipes.support.shared_configs import EpisodesConfig, MachineConfig

    root = folder / f"demonstrations-{world['type']}"
    with FileLock(f"{root}.lock"):
        if not (folder / "demonstrations.json").is_file():
            adapter = load_adapter(draccus.decode(PolicyConfig, policy))
            session = Session(
                adapter, draccus.decode(EnvConfig, world), EpisodesConfig(), MachineConfig(**MACHINE)
            )
            with session.environments(1, keep_seen=True) as vec:
                episodes = Rollouts(session.runner, vec, session.own_noise, 0).collect(STEPS, progress=False)
            Recorder(root, session.env.fps).add(episode.frames for episode in episodes)
            (folder / "demonstrations.json").write_text("{}\n", encoding="utf-8")
    say("tiny: lora learns from a recorded episode of the random policy, which never succeeds")
    return {"repo_id": REPO_ID, "root": str(root)}
