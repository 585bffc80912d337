"""What steering costs at inference: time per executed chunk of a steered policy over its base's own.

python -m tests.benchmarks.overhead outputs/adapt/.../artefact
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.factory import make_pre_post_processors

from tests.benchmarks.updates import wall_clock_of
from trimtab.policies.steered.modeling_trimtab import TrimtabPolicy
from trimtab.recipes.support.reporting import write_json

OBSERVATIONS = 8  # different ones, in turn
WARM_UP = 10  # chunks of each policy that do not count


def run_overhead(folder: Path, chunks: int) -> dict[str, Any]:
    """Time chunks of a steered policy and of its base in turn, one observation at a time.

    A chunk is what `lerobot-eval` and `lerobot-rollout` do for it: as many times as it has executed actions,
    preprocess the observation, `select_action`, postprocess the action. The base is LeRobot's own policy.

    Args:
        folder: of the artefact.
        chunks: of each policy.

    Returns:
        ``base_ms`` and ``steered_ms``: medians per chunk; ``ratio`` of these; ``paired_ratio``: the median of
        the ratios of neighbours in time, with its ``quartiles``; the same of the policies alone (without
        the processors) under ``policy_alone``; and the ``setting``.
    """
    config = PreTrainedConfig.from_pretrained(folder)
    steered = TrimtabPolicy.from_pretrained(folder, config=config)
    assert steered.base is not None, "its base runs on a policy server, whose time is not ours to measure"
    steps = config.n_action_steps
    before, after = make_pre_post_processors(config, pretrained_path=str(folder))
    generator = torch.Generator().manual_seed(0)
    observations = [
        {k: v[:, -1] if torch.is_tensor(v) else v for k, v in one.items()}
        for one in (steered.adapter.example_observation(1, generator) for _ in range(OBSERVATIONS))
    ]

    def chunk(policy: Any, start: int) -> tuple[float, float]:
        """Seconds of a chunk, and of the policy alone in it."""
        policy.reset()  # an episode's first chunk: what the other policy kept is no matter
        alone, begun = 0.0, clock()
        for step in range(steps):
            batch = before(dict(observations[(start + step) % OBSERVATIONS]))
            asked = clock()
            action = policy.select_action(batch)
            alone += clock() - asked
            after(action)
        return clock() - begun, alone

    clock = wall_clock_of(steered.adapter.device)
    times: dict[str, list[tuple[float, float]]] = {"base": [], "steered": []}
    policies = {"base": steered.base, "steered": steered}
    with torch.inference_mode():
        for turn in range(WARM_UP + chunks):
            for name in sorted(policies, reverse=bool(turn % 2)):
                times[name].append(chunk(policies[name], turn))
    counted = {name: found[WARM_UP:] for name, found in times.items()}
    setting = {
        "base": steered.adapter.policy_type,
        "base_parameters": steered.adapter.parameter_count,
        "actor_parameters": sum(parameter.numel() for parameter in steered.actor.parameters()),
        "num_candidates": config.num_candidates,
        "actions_per_chunk": steps,
        "chunks": chunks,
        "device": str(steered.adapter.device),
        "threads": torch.get_num_threads(),
    }
    whole, alone = ({name: [t[part] for t in found] for name, found in counted.items()} for part in (0, 1))
    return {**compare(whole), "policy_alone": compare(alone), "setting": setting}


def compare(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Medians, their ratio, and the ratios of pairs, of ``base`` and ``steered``."""
    base, steered = (statistics.median(seconds[name]) for name in ("base", "steered"))
    ratios = [s / b for s, b in zip(seconds["steered"], seconds["base"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {
        "base_ms": round(1e3 * base, 3),
        "steered_ms": round(1e3 * steered, 3),
        "ratio": round(steered / base, 4),
        "paired_ratio": round(middle, 4),
        "quartiles": [round(low, 4), round(high, 4)],
    }


def table(found: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| per chunk | base | steered | steered / base | of neighbours: median (quartiles) |",
        "|---|---|---|---|---|",
    ]
    for name, row in (("with processors", found), ("policy alone", found["policy_alone"])):
        low, high = row["quartiles"]
        lines.append(
            f"| {name} | {row['base_ms']:.2f} ms | {row['steered_ms']:.2f} ms | {row['ratio']:.3f} | "
            f"{row['paired_ratio']:.3f} ({low:.3f} to {high:.3f}) |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.overhead", description=__doc__)
    parser.add_argument("artefact", type=Path, help="folder that `trimtab adapt` wrote")
    parser.add_argument("--chunks", type=int, default=300, help="of each policy")
    parser.add_argument("--output", type=Path, help="JSON")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    found = run_overhead(options.artefact, options.chunks)
    print(table(found))
    if options.output:
        write_json(options.output, found)


if __name__ == "__main__":
    main()
