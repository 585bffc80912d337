"""Records of a comparison from the folders that `trimtab adapt`, `lora`, `eval` and `demo` left."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trimtab.adapters import UserError
from trimtab.adapters.checkpoint.files import CONFIG
from trimtab.recipes.compare.runs import folder_bytes
from trimtab.recipes.support.reporting import read_json

RESULTS, METRICS = "results.json", "metrics.jsonl"
OPTION = "--runs"
# What learns nothing, by its name in a run's results and in a comparison.
FIXED = {"base": "base", "zero_noise": "zero_noise", "constant_noise": "best_constant"}
DIFFER = "{0} and {2} have not the same %s: {1}, {3}"
Record = dict[str, Any]


def read_runs(folders: Sequence[Path]) -> tuple[list[Record], list[tuple[str, Path]]]:
    """Records of all folders, and their videos with captions.

    Policies that learn nothing come from the first folder of each task.

    Raises:
        UserError: no such folder, one that holds no evaluated run, or runs that cannot be compared.
    """
    runs: dict[tuple[str, str, int | None], Record] = {}
    videos: list[tuple[str, Path]] = []
    first: dict[str, tuple[Any, Path]] = {}  # what the folders must share, and which said it first
    for folder in folders:
        results, config = _read(folder)
        task = results["env"]["task"] or results["env"]["type"]
        env = {name: value for name, value in (config.get("env") or {}).items() if name != "task"}
        for what, value, differ in (
            ("base", results.get("base_sha256"), DIFFER % "base policy"),
            ("environment", env or None, DIFFER % "environment"),
            (f"seeds of {task}", results["evaluation_seeds"], "{0} was evaluated on seeds {1}, {2} on {3}"),
        ):
            if value is not None:
                known, other = first.setdefault(what, (value, folder))
                if value != known:
                    raise UserError(OPTION, differ.format(folder, value, other, known))
        records = _records(folder, results, config)
        for record in records:
            policy = "policy" if record["method"] in FIXED.values() else "actor"
            key = (task, record["method"], record.setdefault("seed", None))
            if key in runs and policy == "actor":
                raise UserError(OPTION, f"{folder} is a second run of {key[1]}, seed {key[2]}")
            blank = {"task": task, "points": [], "episodes": [], "cost": {}}
            runs.setdefault(key, blank | record | {"final": {policy: record["final"]}})
        method = records[-1]["method"] if records else ""
        for name in ("before", "after", "rollouts"):
            if (folder / f"{name}.mp4").is_file():
                videos.append((f"{task}, {folder.name}: {method}, {name}", folder / f"{name}.mp4"))
    return list(runs.values()), videos


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Results and configuration of a run."""
    if not folder.is_dir():
        raise UserError(OPTION, f"there is no folder {folder}")
    if not (folder / RESULTS).is_file():
        raise UserError(
            OPTION,
            f"{folder} holds no {RESULTS}; name folders that trimtab adapt, lora or eval wrote to the end",
        )
    try:
        results = read_json(folder / RESULTS)
        config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
        results["policies"], results["evaluation_seeds"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(OPTION, f"{folder / RESULTS} is no result of a run ({error})") from None
    if not results.get("env") or not results["policies"]:
        raise UserError(OPTION, f"{folder} was not evaluated in an environment; run it with --env.type")
    return results, config


def _records(folder: Path, results: dict[str, Any], config: dict[str, Any]) -> list[Record]:
    """What the run has found: one record per policy."""
    path, seconds = folder / METRICS, results.get("seconds", {})
    paired = results.get("paired", True)
    won, returns = (results.get(name) or {} if paired else {} for name in ("outcomes", "returns"))
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.is_file() else []
    finals = {
        name: final | {"won": won.get(name, ""), "returns": returns.get(name)}
        for name, final in results["policies"].items()
    }
    found: list[Record] = [
        {"method": method, "final": finals[name]} for name, method in FIXED.items() if name in finals
    ]
    learnt: Record = {
        "seed": results.get("seed", 0),
        "search_episodes": results.get("training_episodes", 0),
    }
    if "steered" in finals:
        method = "steered"
        if config.get("rl"):
            method = f"{config['rl'].get('type', 'dsrl_sac')} ({config.get('noise', {}).get('type', 'full')})"
        learnt |= {"method": method, "final": finals["steered"]}
        learnt["points"] = [
            _point(line, {"success_rate": line["success_rate"], "episodes": line["success_window"]})
            for line in lines
            if line.get("success_window")
            and (line["success_rate"] is None) == (finals["steered"]["success_rate"] is None)
        ]
        learnt["cost"] = {
            "trainable_parameters": {"actor": results.get("actor_parameters")},
            "wall_seconds": seconds.get("steering"),
            "artefact_bytes": folder_bytes(folder / "artefact") or None,
        }
    if "fine_tuned" in finals:
        source = "own successes" if results["from_rollouts"] else "demonstrations"
        learnt |= {"method": f"{results['method']}, {source}", "final": finals["fine_tuned"]}
        learnt["points"] = [
            _point(line, line["eval"]) for line in lines if line.get("round") and "eval" in line
        ]
        learnt["cost"] = {
            "trainable_parameters": {"actor": results["trained_parameters"]},
            "artefact_bytes": results["saved_bytes"],
            "wall_seconds": sum(seconds.get(part, 0.0) for part in ("rollouts", "recording", "training")),
        }
    return [*found, learnt] if "method" in learnt else found


def _point(line: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """A point of the curve: what a line of metrics says of some episodes."""
    steps, rate = line["env_steps"], found["success_rate"]
    won = None if rate is None else round(rate * found["episodes"])
    return_mean = found.get("return_mean", line.get("return_mean"))
    summary = {
        "successes": won,
        "episodes": found["episodes"],
        "success_rate": rate,
        "return_mean": return_mean,
    }
    return {"grid": steps, "env_steps": steps, "actor": summary}
