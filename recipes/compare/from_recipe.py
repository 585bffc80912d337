"""``trimtab compare --config_path=RECIPE``: the comparison that a recipe's adapt.yaml and lora.yaml imply.

Imports nothing heavy: options are read before anything else is loaded.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

# What needs neither demonstrations nor more steps than a small budget has.
LEARN_NOTHING_NEW = ("base", "zero_noise", "golden_ticket", "steered", "residual")
FINE_TUNED = "lora_rollouts"
STEERED = ("rl", "noise", "train")
NO_PART = ("demos", "checkpoint", "faults", "trackers", "resume", "seed", "output_dir", "eval")
OWN_TRAIN = ("env_steps", "log_every", "warm_start")  # the comparison's own, or of no use there
GRIDS = 5  # evaluations of a run, where no lora.yaml says how many rounds


def is_recipe(content: dict[str, Any]) -> bool:
    """Whether options are `trimtab adapt`'s."""
    return "rl" in content or "train" in content


def comparison(content: dict[str, Any], lora: dict[str, Any] | None, server: bool) -> dict[str, Any]:
    """Options of `trimtab compare` for what ``content`` steers.

    Args:
        content: options of `trimtab adapt`: a recipe's, or the config.json of a run.
        lora: those of `trimtab lora` beside it, if there are any.
        server: whether the base is on a policy server, so that it cannot be fine-tuned.
    """
    # What is in neither is left in, for the parser to refuse.
    found = {name: value for name, value in content.items() if name not in (*STEERED, *NO_PART)}
    train = dict(content.get("train") or {})
    steps = train.get("env_steps")
    steered = {name: dict(content[name]) for name in STEERED if content.get(name)}
    if "train" in steered:
        steered["train"] = {name: value for name, value in train.items() if name not in OWN_TRAIN}
    methods, settings = [*LEARN_NOTHING_NEW], {"steered": steered} if steered else {}
    tuned = lora is not None and lora.get("from_rollouts") and not server
    if not server:
        methods.append(FINE_TUNED)
    if tuned:
        settings[FINE_TUNED] = {"tuning": tuning_of(lora)}
    found |= {"methods": ",".join(methods), "settings": settings}
    if steps:
        rounds = lora.get("rounds", GRIDS) if tuned else GRIDS
        rounds = next(n for n in range(min(rounds, steps), 0, -1) if steps % n == 0)
        found |= {"env_steps": steps, "grid": steps // rounds}
    evaluation = content.get("eval") or {}
    if "n_episodes" in evaluation:
        found |= {"n_episodes": evaluation["n_episodes"], "final_episodes": evaluation["n_episodes"]}
    found |= {name: evaluation[name] for name in ("batch_size", "videos") if name in evaluation}
    return found


def tuning_of(lora: dict[str, Any]) -> dict[str, Any]:
    """How to fine-tune, of the options of `trimtab lora`."""
    from trimtab.recipes.lora_training import TuningConfig

    return {field.name: lora[field.name] for field in fields(TuningConfig) if field.name in lora}
