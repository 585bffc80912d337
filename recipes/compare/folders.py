"""Records of a comparison from the folders that `trimtab adapt`, `lora`, `eval` and `demo` left."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trimtab.adapters import UserError
from trimtab.adapters.checkpoint.files import CONFIG
from trimtab.recipes.compare.methods import folder_bytes
from trimtab.recipes.support.reporting import read_json

RESULTS, METRICS = "results.json", "metrics.jsonl"
OPTION = "--runs"
SHARED = {"base": "base", "zero_noise": "zero_noise", "constant_noise": "best_constant"}


def read_runs(folders: Sequence[Path]) -> tuple[list[dict[str, Any]], list[tuple[str, Path]]]:
    """Records of all folders, and their videos with captions.

    Policies that learn nothing come from the first folder of each task.

    Raises:
        UserError: no such folder, one that holds no evaluated run, or runs that cannot be compared.
    """
    runs: dict[tuple[str, str, int | None], dict[str, Any]] = {}
    videos: list[tuple[str, Path]] = []
    same: dict[str, Any] = {}
    episodes: dict[str, tuple[Any, Path]] = {}
    for folder in folders:
        results, config = _read(folder)
        told = {"base_sha256": "base policy", "env": "environment"}
        facts = {"base_sha256": results.get("base_sha256"), "env": _env(results, config)}
        for name, what in told.items():
            other, where = same.setdefault(name, (facts[name], folder))
            if facts[name] is not None and other is not None and facts[name] != other:
                raise UserError(
                    OPTION, f"{folder} and {where} have not the same {what}: {facts[name]}, {other}"
                )
        task = results["env"]["task"] or results["env"]["type"]
        seeds, where = episodes.setdefault(task, (results["evaluation_seeds"], folder))
        if results["evaluation_seeds"] != seeds:
            raise UserError(
                OPTION, f"{folder} was evaluated on seeds {results['evaluation_seeds']}, {where} on {seeds}"
            )
        for record in _records(folder, results, config, task):
            key = (task, record["method"], record["seed"])
            if key in runs and record["method"] not in SHARED.values():
                raise UserError(
                    OPTION, f"{folder} is a second run of {record['method']}, seed {record['seed']}"
                )
            runs.setdefault(key, record)
        method = next((m for t, m, _ in reversed(runs) if t == task), "")
        for name in ("before", "after", "rollouts"):
            if (folder / f"{name}.mp4").is_file():
                videos.append((f"{task}, {folder.name}: {method}, {name}", folder / f"{name}.mp4"))
    return list(runs.values()), videos


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
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


def _env(results: dict[str, Any], config: dict[str, Any]) -> dict[str, Any] | None:
    """The environment without its task; ``None`` where the folder does not tell its settings."""
    env = config.get("env")
    return {name: value for name, value in env.items() if name != "task"} if env else None


def _records(
    folder: Path, results: dict[str, Any], config: dict[str, Any], task: str
) -> list[dict[str, Any]]:
    seed = results.get("seed", 0)
    found = []
    for name, method in SHARED.items():
        if name in results["policies"]:
            final = {"policy": _with_outcomes(results, name)}
            found.append(_record(task, method, None, final))
    lines = _lines(folder / METRICS)
    if "steered" in results["policies"]:
        method = "steered"
        if config.get("rl"):
            method = f"{config['rl'].get('type', 'dsrl_sac')} ({config.get('noise', {}).get('type', 'full')})"
        record = _record(task, method, seed, {"actor": _with_outcomes(results, "steered")})
        for line in lines:
            of = line.get("success_window", 0)
            if of and line["success_rate"] is not None:
                won = round(line["success_rate"] * of)
                point = {"successes": won, "episodes": of, "success_rate": won / of}
                steps = line["env_steps"]
                record["points"].append({"grid": steps, "env_steps": steps, "actor": point})
        record["search_episodes"] = results.get("training_episodes", 0)
        record["cost"] = {
            "trainable_parameters": {"actor": results.get("actor_parameters")},
            "wall_seconds": results.get("seconds", {}).get("steering"),
        }
        if (folder / "artefact").is_dir():
            record["cost"]["artefact_bytes"] = folder_bytes(folder / "artefact")
        found.append(record)
    if "fine_tuned" in results["policies"]:
        method = f"{results['method']}{', own successes' if results['from_rollouts'] else ', demonstrations'}"
        record = _record(task, method, seed, {"actor": _with_outcomes(results, "fine_tuned")})
        for line in lines:
            if line.get("round") and "eval" in line:
                steps = line["env_steps"]
                record["points"].append({"grid": steps, "env_steps": steps, "actor": line["eval"]})
        record["search_episodes"] = results.get("training_episodes", 0)
        spent = [results["seconds"].get(name, 0.0) for name in ("rollouts", "recording", "training")]
        record["cost"] = {
            "trainable_parameters": {"actor": results["trained_parameters"]},
            "artefact_bytes": results["saved_bytes"],
            "wall_seconds": sum(spent),
        }
        found.append(record)
    return found


def _record(task: str, method: str, seed: int | None, final: dict[str, Any]) -> dict[str, Any]:
    return {
        **{"task": task, "method": method, "seed": seed, "final": final},
        **{"points": [], "episodes": [], "cost": {}},
    }


def _with_outcomes(results: dict[str, Any], name: str) -> dict[str, Any]:
    if results["policies"][name]["success_rate"] is None:
        task = (results.get("env") or {}).get("task")
        raise UserError(
            "--runs", f"a run on {task} reports no success, and a comparison counts successes alone"
        )
    return results["policies"][name] | {"won": (results.get("outcomes") or {}).get(name, "")}


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
