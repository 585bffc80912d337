"""What a probe's measurements mean, in words."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trimtab.adapters.remote import MEND, RemoteAdapter
from trimtab.adapters.steerability import Steerability
from trimtab.rl.evaluation import Evaluation
from trimtab.rl.statistics import paired_difference, wilson_interval

WEAK_AUTHORITY = 0.02  # below it, noise moves the actions too little to steer by
SOLVED = 0.95  # a success rate that leaves nothing to learn
WORSE = 0.15  # a loss of success that no noise space is worth


@dataclass
class Verdict:
    """Whether a policy can be steered, and how.

    Attributes:
        steerable: whether to go on.
        headline: one sentence.
        lines: what else there is to say.
        noise: the noise space to use (``--noise.type``), ``constant`` where no learning is needed, or
            ``None``.
    """

    steerable: bool
    headline: str
    lines: list[str] = field(default_factory=list)
    noise: str | None = None


def judge(
    measured: Steerability, policy_type: str, evaluations: dict[str, Evaluation] | None = None
) -> Verdict:
    """The verdict on a policy from what its noise does, and from how it succeeds if that is known.

    Args:
        measured: of the policy's function.
        policy_type: LeRobot's name.
        evaluations: ``base``, ``zero_noise``, ``constant_noise`` and, where the noise has rows,
            ``repeated_noise``, all on the same episodes.
    """
    if not measured.finite:
        return Verdict(False, "cannot be steered: it turns ordinary noise into NaN or Inf actions")
    if not measured.deterministic:
        return Verdict(
            False,
            "cannot be steered: the same noise gives different chunks "
            f"(by up to {measured.repeat_difference:.2g}), so it draws randomness while it samples",
            _random_hint(policy_type),
        )
    if measured.blind:
        return Verdict(
            False,
            "cannot be steered: every noise gives the same chunk, so the policy ignores its noise",
            _blind_hint(policy_type),
        )
    if measured.authority < WEAK_AUTHORITY:
        return Verdict(
            False,
            f"hardly worth steering: the noise makes up {100 * measured.authority:.2g} % of the spread of "
            "its actions",
            _blind_hint(policy_type),
        )
    lines = [
        f"the noise makes up {100 * measured.authority:.0f} % of the spread of its actions (standard "
        "deviation due to noise over that over noises and observations)"
    ]
    inert = measured.inert_columns
    if measured.declared_inert:
        lines.append(f"{measured.declared_inert} noise entries are inert (masked by the policy)")
    if inert:
        lines.append(f"noise dimensions that change nothing: {', '.join(map(str, inert))}")
    if not evaluations:
        return Verdict(True, "can be steered: deterministic given its noise, and the noise matters", lines)
    return _judge_success(evaluations, lines)


def _random_hint(policy_type: str) -> list[str]:
    if policy_type == RemoteAdapter.policy_type:
        return [MEND]
    return ["save it with a deterministic sampler (for diffusion: noise_scheduler_type=DDIM)"]


def _blind_hint(policy_type: str) -> list[str]:
    if policy_type == RemoteAdapter.policy_type:
        return [MEND]
    if policy_type == "act":
        return ["its CVAE latent has collapsed, so the decoder ignores it; retrain with a smaller kl_weight"]
    return ["check that these are the weights you trained, and that the sampler starts from its noise"]


def _judge_success(evaluations: dict[str, Evaluation], lines: list[str]) -> Verdict:
    base = evaluations["base"]
    count, total = int(base.successes.sum()), len(base.successes)
    low, high = wilson_interval(count, total)
    rate = f"{100 * base.success_rate:.0f} % [{100 * low:.0f}, {100 * high:.0f}]"
    if base.success_rate >= SOLVED:
        headline = f"can be steered, but there is little to gain: the base succeeds in {rate}"
        return Verdict(True, headline, lines)
    noise = "full"
    if "repeated_noise" in evaluations:
        difference, worst, best = paired_difference(base.successes, evaluations["repeated_noise"].successes)
        said = f"{100 * difference:+.0f} points [{100 * worst:+.0f}, {100 * best:+.0f}] against the base"
        if best < 0 or difference < -WORSE:
            lines.append(f"repeated noise costs success ({said}): steer the full noise")
        else:
            noise = "repeat"
            lines.append(f"repeated noise keeps the base's success ({said}): steer one vector per chunk")
    for name, said in (("zero_noise", "zero noise"), ("constant_noise", "one constant noise")):
        if name not in evaluations:
            continue
        other = evaluations[name]
        difference, worst, _ = paired_difference(base.successes, other.successes)
        if other.success_rate >= SOLVED and worst > 0:
            return Verdict(
                True,
                f"needs no learning: {said} alone succeeds in {100 * other.success_rate:.0f} %, "
                f"the base in {rate}",
                lines,
                "constant",
            )
        if worst > 0:
            lines.append(f"{said} gains {100 * difference:.0f} points by itself")
    reachable = reached_by_any(evaluations)
    lines.append(
        f"{100 * reachable:.0f} % of the starts were solved by at least one of the noises tried; steering "
        "has to learn which"
    )
    if reachable == 0:
        return Verdict(
            False,
            f"nothing to learn from: no noise succeeded once in {total} episodes",
            [*lines, "improve the base first (demonstrations), or reward progress instead of success"],
        )
    headline = f"can be steered: the base succeeds in {rate}; use --noise.type={noise}"
    return Verdict(True, headline, lines, noise)


def reached_by_any(evaluations: dict[str, Evaluation]) -> float:
    """Share of the episode seeds that succeeded under at least one of the noise sources."""
    solved = [evaluation.successes for evaluation in evaluations.values()]
    return float(sum(any(row) for row in zip(*solved, strict=True)) / len(solved[0]))


def as_json(measured: Steerability, verdict: Verdict) -> dict[str, Any]:
    """Measurements and verdict as JSON values."""
    return {
        "steerable": verdict.steerable,
        "verdict": verdict.headline,
        "lines": verdict.lines,
        "noise_type": verdict.noise,
        "deterministic": measured.deterministic,
        "repeat_difference": measured.repeat_difference,
        "noise_difference": measured.noise_difference,
        "authority": measured.authority,
        "spread_by_step": measured.spread.square().mean(-1).sqrt().tolist(),
        "spread_by_action": measured.spread.square().mean(0).sqrt().tolist(),
        "column_effect": measured.column_effect.tolist(),
        "inert_columns": measured.inert_columns,
        "declared_inert": measured.declared_inert,
        "inert_difference": measured.inert_difference,
        "row_blocks": measured.row_blocks,
        "row_effect": measured.row_effect.tolist(),
        "observations": measured.observations,
        "noises": measured.noises,
        "seconds": measured.seconds,
    }
