"""Budgets and sizes of a tiny run: what becomes of a recipe's own."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from trimtab.adapters.checkpoint.folder import is_server
from trimtab.recipes.compare.from_recipe import FINE_TUNED, LEARN_NOTHING_NEW
from trimtab.recipes.support.option_dicts import merge
from trimtab.rl.algorithms import AlgorithmConfig

STEPS = 24  # of an episode
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


def shrink(content: dict[str, Any], command: str) -> None:
    """Budgets and sizes of seconds, in the place of the recipe's."""
    content |= merge(content, BUDGETS[command])
    steered, tuned = [content] * (command == "adapt"), [content] * (command == "lora")
    if command == "adapt":
        content.pop("demos", None)
    if command == "compare":
        small = _small_methods(content)
        settings = {name: (content.get("settings") or {}).get(name) or {} for name in small}
        steered = [settings[name] for name in ("steered", "residual") if name in small]
        tuned = [settings[FINE_TUNED].setdefault("tuning", {})] if FINE_TUNED in small else []
        content |= {"methods": ",".join(small), "settings": settings}
    for part in steered:
        part |= _small_steering(part)
    for part in tuned:
        peft = part.get("peft") or {}
        part |= {**TUNING, "peft": {**peft, "r": min(4, peft.get("r", 4))}}
    observe = content.get("observe") or {}
    observe.pop("cameras", None)  # the environment has one, under another name
    if "images" in (observe.get("inputs") or ()):
        observe["image_size"] = 32


def _small_methods(content: dict[str, Any]) -> list[str]:
    """Of the comparison's methods those that a few chunks suffice for; what is no method is left in."""
    from trimtab.recipes.compare.config import METHODS

    known = [*LEARN_NOTHING_NEW, *(() if is_server(content["policy"]["path"]) else (FINE_TUNED,))]
    names = [name.strip() for name in content.get("methods", ",".join(known)).split(",")]
    return [name for name in names if name in known or name not in METHODS]


def _small_steering(content: dict[str, Any]) -> dict[str, Any]:
    """``train`` and ``rl`` of ``content`` with a pace and networks for a few chunks."""
    train, rl = content.get("train") or {}, content.get("rl") or {}
    pace = min(2.0, train.get("updates_per_transition") or 2.0)
    small = {name: value for name, value in train.items() if name != "warm_start"}
    small |= {**PACE, "updates_per_transition": pace}
    cls = AlgorithmConfig.get_known_choices().get(str(rl.get("type")))
    if cls is None:
        return {"train": small}
    names = {field.name for field in fields(cls)}
    caps = {name: min(most, rl.get(name) or most) for name, most in RL.items() if name in names}
    networks = {name: NARROW for name in ("actor", "critic") if name in names}
    return {"train": small, "rl": merge({**rl, **caps}, networks)}
