"""What a probe's measurements mean, in words."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from trimtab.adapters.remote.adapter import MEND, RemoteAdapter
from trimtab.adapters.steerability import Steerability
from trimtab.recipes.support.reporting import return_text
from trimtab.rl.evaluation import Evaluation
from trimtab.rl.statistics import paired_difference, wilson_interval

WEAK_AUTHORITY = 0.02  # below it, noise moves the actions too little to steer by
SOLVED = 0.9  # a success rate whose lower limit is above this leaves little to learn
FEW = 20  # episodes below which nothing is concluded from a difference


@dataclass
class Verdict:
    """Whether a policy can be steered, and how.

    Attributes:
        steerable: whether to go on.
        headline: one sentence.
        lines: what else there is to say.
        noise: the noise space to use (``--noise.type``); where no learning is needed the name of what does
            without (``zero_noise``, ``constant_noise`` ...); or ``None``.
    """

    steerable: bool
    headline: str
    lines: list[str] = field(default_factory=list)
    noise: str | None = None


def judge(
    measured: Steerability,
    policy_type: str,
    evaluations: dict[str, Evaluation] | None = None,
    constants: list[dict[str, Any]] | None = None,
) -> Verdict:
    """The verdict on a policy from what its noise does, and from how it succeeds if that is known.

    Args:
        measured: of the policy's function.
        policy_type: LeRobot's name.
        evaluations: ``base``, ``zero_noise``, ``constant_noise`` and, where the noise has rows,
            ``repeated_noise``, all on the same episodes.
        constants: successes and episodes of each constant that was tried, on other episodes.
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
    share = (
        f"the noise makes up {percent(measured.authority)} of the spread of its actions (standard "
        f"deviation due to noise over the total; {measured.observations} observations, "
        f"{measured.noises} noises)"
    )
    if measured.authority < WEAK_AUTHORITY and not evaluations:
        return Verdict(False, f"hardly worth steering: {share}", ["try it in its environment: --env.type="])
    lines = [share]
    inert = measured.inert_columns
    if measured.declared_inert:
        lines.append(f"{measured.declared_inert} noise entries are inert (masked by the policy)")
    if inert:
        lines.append(f"noise dimensions that change nothing: {', '.join(map(str, inert))}")
    if not evaluations:
        return Verdict(True, "can be steered: deterministic given its noise, and the noise matters", lines)
    return _judge_success(evaluations, constants or [], lines)


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


def percent(share: float) -> str:
    """A share in percent: ``100 %``, ``3.4 %``, ``0.05 %``; never in powers of ten."""
    value = 100 * share
    if abs(value) >= 10:
        return f"{value:.0f} %"
    return f"{value:.2g} %" if abs(value) >= 0.01 or value == 0 else "under 0.01 %"


def rate(evaluation: Evaluation) -> str:
    """A success rate with its 95 % interval."""
    count, total = int(evaluation.successes.sum()), len(evaluation.successes)
    low, high = wilson_interval(count, total)
    return f"{100 * count / total:.0f} % [{100 * low:.0f}, {100 * high:.0f}] ({count}/{total})"


def _judge_success(
    evaluations: dict[str, Evaluation], constants: list[dict[str, Any]], lines: list[str]
) -> Verdict:
    base, others = evaluations["base"], {k: v for k, v in evaluations.items() if k != "base"}
    total = len(base.successes)
    if not base.reported:
        gained = {name: return_text(e.summary()) for name, e in evaluations.items()}
        return Verdict(
            True,
            f"can be steered, by return: the environment reports no success; the base's return is "
            f"{gained['base']}; use --noise.type=full --train.reward=env",
            [*lines, *(f"return under {SOURCES[name]}: {gained[name]}" for name in others)],
            "full",
        )
    tried = sum(len(e.successes) for e in evaluations.values()) + sum(c["episodes"] for c in constants)
    won = sum(int(e.successes.sum()) for e in evaluations.values()) + sum(c["successes"] for c in constants)
    if not won:
        _, high = wilson_interval(0, tried)
        return Verdict(
            False,
            f"nothing seen to learn from: no success in {tried} episodes under any noise (95 %: at most "
            f"{percent(high)})",
            [*lines, "improve the base first (demonstrations), or reward progress instead of success"],
        )
    for name, said in SOURCES.items():
        if name in others and _lower(others[name]) >= SOLVED and _difference(base, others[name])[1] > 0:
            return Verdict(
                True,
                f"needs no learning: {said} succeeds in {rate(others[name])}, the base in {rate(base)}",
                lines,
                name,
            )
    if _lower(base) >= SOLVED:
        return Verdict(True, f"can be steered, with little to gain: the base succeeds in {rate(base)}", lines)
    noise = "full"
    if "repeated_noise" in others:
        noise, line = _repeated(base, others["repeated_noise"])
        lines.append(line)
    for name in ("zero_noise", "constant_noise"):
        if name in others and _difference(base, others[name])[1] > 0:
            lines.append(f"{SOURCES[name]} gains by itself: {_said(base, others[name])}")
    if "prior_noise" in others and _difference(base, others["prior_noise"])[2] < 0:
        lines.append(
            f"draws from its prior cost success ({_said(base, others['prior_noise'])}), and an untrained "
            "actor starts there: keep --noise.bound small"
        )
    if total < FEW:
        lines.append(f"{total} episodes tell little; raise --eval.n_episodes")
    return Verdict(
        True, f"can be steered: the base succeeds in {rate(base)}; use --noise.type={noise}", lines, noise
    )


SOURCES = {
    "zero_noise": "zero noise",
    "constant_noise": "one constant noise",
    "repeated_noise": "repeated noise",
    "prior_noise": "a draw from the prior",
}


def _repeated(base: Evaluation, repeated: Evaluation) -> tuple[str, str]:
    """The noise space to use, and why: one vector per chunk only where it keeps most of the success."""
    _, worst, best = _difference(base, repeated)
    margin = base.success_rate / 2
    said = _said(base, repeated)
    if best < 0:
        return "full", f"repeated noise costs success: {said}"
    if worst > -margin and len(base.successes) >= FEW:
        return "repeat", f"repeated noise keeps at least half of the base's success: {said}; fewer dimensions"
    return "full", (
        f"whether repeated noise keeps the base's success is open: {said}; raise --eval.n_episodes to find "
        "out, for it is learnt faster"
    )


def _difference(base: Evaluation, other: Evaluation) -> tuple[float, float, float]:
    return paired_difference(base.successes, other.successes)


def _said(base: Evaluation, other: Evaluation) -> str:
    difference, worst, best = _difference(base, other)
    return f"{100 * difference:+.0f} points [{100 * worst:+.0f}, {100 * best:+.0f}]"


def _lower(evaluation: Evaluation) -> float:
    return wilson_interval(int(evaluation.successes.sum()), len(evaluation.successes))[0]


def as_json(measured: Steerability, verdict: Verdict) -> dict[str, Any]:
    """Measurements and verdict as JSON values; NaN and Inf, which JSON has not, become null."""
    values = {
        "steerable": verdict.steerable,
        "verdict": verdict.headline,
        "lines": verdict.lines,
        "noise_type": verdict.noise,
        "deterministic": measured.deterministic,
        "repeat_difference": measured.repeat_difference,
        "noise_difference": measured.noise_difference,
        "rounding_floor": measured.floor,
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
        "seconds": {
            name: dict(zip(("median", "least", "most"), times, strict=True))
            for name, times in measured.seconds.items()
        },
    }
    return {name: _finite(value) for name, value in values.items()}


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
