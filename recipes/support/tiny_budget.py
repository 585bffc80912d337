"""Budgets and sizes of a tiny run: what becomes of a recipe's own."""

from __future__ import annotations

from typing import Any

from trimtab.recipes.compare.from_recipe import FINE_TUNED, LEARN_NOTHING_NEW
from trimtab.recipes.support.layers import merge

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
    from trimtab.adapters.checkpoint.folder import is_server
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
        content["rl"] = merge(rl, {"actor": NARROW, "critic": NARROW})


def _shrink_tuning(content: dict[str, Any]) -> None:
    """A few steps of a narrow LoRA."""
    content |= TUNING
    peft = content.setdefault("peft", {})
    peft["r"] = min(4, peft.get("r", 4))
