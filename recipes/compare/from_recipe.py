"""``trimtab compare --config_path=RECIPE``: the comparison that a recipe's adapt.yaml and lora.yaml imply.

Imports nothing heavy: options are read before anything else is loaded.
"""

from dataclasses import fields
from typing import Any

from trimtab.adapters.errors import UserError
from trimtab.rl.algorithms.presets import IMPLIED_DEFAULTS

# What needs neither demonstrations nor more steps than a small budget has.
LEARN_NOTHING_NEW = ("base", "zero_noise", "golden_ticket", "steered", "residual")
FINE_TUNED = "lora_rollouts"
STEERED = ("rl", "noise", "train")
NO_PART = ("demos", "checkpoint", "faults", "trackers", "resume", "seed", "output_dir", "eval")
OWN_TRAIN = ("env_steps", "episodes", "log_every", "reward")  # the comparison's own
COUNT_SUCCESSES = ("golden_ticket", FINE_TUNED)  # no part where the environment's reward is learnt from


def is_recipe(content: dict[str, Any]) -> bool:
    """Whether options are `trimtab adapt`'s."""
    return isinstance(content.get("rl"), dict) or isinstance(content.get("train"), dict)


def comparison(content: dict[str, Any], lora: dict[str, Any] | None, server: bool) -> dict[str, Any]:
    """Options of `trimtab compare` for what ``content`` steers.

    Args:
        content: options of `trimtab adapt`: a recipe's, or the config.json of a run.
        lora: those of `trimtab lora` beside it, if there are any.
        server: whether the base is on a policy server, so that it cannot be fine-tuned.

    Raises:
        UserError: demonstrations take part in it.
    """
    demos = content.get("demos") or {}
    if demos.get("root") or demos.get("repo_id"):
        raise UserError("--demos.repo_id", "compare replays no demonstrations; leave them out of the file")
    # What is in neither is left in, for the parser to refuse.
    options = {name: value for name, value in content.items() if name not in (*STEERED, *NO_PART)}
    steered = {name: content[name] for name in STEERED if isinstance(content.get(name), dict)}
    train = steered.pop("train", {})
    if others := {name: value for name, value in train.items() if name not in OWN_TRAIN}:
        steered["train"] = others
    algorithm = steered.get("rl", {}).get("type")
    steered = IMPLIED_DEFAULTS.get(algorithm, {}) | steered  # as adapt does
    methods, settings = [*LEARN_NOTHING_NEW], {"steered": steered} if steered else {}
    if server:
        options["isolate"] = False  # one robot, one process
    else:
        methods.append(FINE_TUNED)
        if lora is not None and lora.get("from_rollouts"):
            from trimtab.recipes.finetune.training import TuningConfig

            known = {field.name for field in fields(TuningConfig)}
            settings[FINE_TUNED] = {"tuning": {n: value for n, value in lora.items() if n in known}}
    evaluation = content.get("eval") or {}
    given = {name: evaluation[name] for name in ("n_episodes", "batch_size", "videos") if name in evaluation}
    if "n_episodes" in given:
        given["final_episodes"] = given["n_episodes"]
    given |= {name: train[name] for name in ("env_steps", "reward") if name in train}
    if given.get("reward") == "env":
        methods = [name for name in methods if name not in COUNT_SUCCESSES]
        settings.pop(FINE_TUNED, None)
    return options | {"methods": ",".join(methods), "settings": settings} | given
