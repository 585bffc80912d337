"""What a probe's measurements mean, in words."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from trimtab.adapters.remote.adapter import MEND, RemoteAdapter
from trimtab.adapters.steerability import Steerability
from trimtab.recipes.support.reporting import NAMES, rate_text, return_text
from trimtab.rl.evaluation import Evaluation
from trimtab.rl.statistics import paired_difference, wilson_interval

WEAK_AUTHORITY = 0.02  # below it, noise moves the actions too little to steer by
SOLVED = 0.9  # a success rate whose lower limit is above this leaves little to learn
FEW = 20  # episodes below which nothing is concluded from a difference
WITHOUT_LEARNING = ("zero_noise", "constant_noise", "repeated_noise", "prior_noise")  # simplest first


@dataclass
class Diagnosis:
    """Whether a policy can be steered, one sentence why, and what else there is to say.

    ``noise`` is the noise space to use (``--noise.type``); where no learning is needed the name of what does
    without (``zero_noise``, ``constant_noise`` ...); or ``None``.
    """

    steerable: bool
    headline: str
    lines: list[str] = field(default_factory=list)
    noise: str | None = None


def diagnose(
    measured: Steerability,
    policy_type: str,
    evaluations: dict[str, Evaluation] | None = None,
    constants: Sequence[dict[str, Any]] = (),
) -> Diagnosis:
    """Judge a policy by what its noise does, and by how it succeeds if that is known.

    Args:
        measured: of the policy's function.
        policy_type: LeRobot's name.
        evaluations: ``base``, ``zero_noise``, ``constant_noise`` and, where the noise has rows,
            ``repeated_noise``, all on the same episodes.
        constants: successes and episodes of each constant that was tried, on other episodes.
    """
    remote = policy_type == RemoteAdapter.policy_type
    if not measured.finite:
        return Diagnosis(False, "cannot be steered: it turns ordinary noise into NaN or Inf actions")
    if not measured.deterministic:
        mend = "save it with a deterministic sampler (for diffusion: noise_scheduler_type=DDIM)"
        return Diagnosis(
            False,
            "cannot be steered: the same noise gives different chunks "
            f"(by up to {measured.repeat_difference:.2g}), so it draws randomness while it samples",
            [MEND if remote else mend],
        )
    if measured.blind:
        mend = "check that these are the weights you trained, and that the sampler starts from its noise"
        if policy_type == "act":
            mend = (
                "its CVAE latent has collapsed, so the decoder ignores it; retrain with a smaller kl_weight"
            )
        return Diagnosis(
            False,
            "cannot be steered: every noise gives the same chunk, so the policy ignores its noise",
            [MEND if remote else mend],
        )
    lines = [
        f"the noise makes up {percent(measured.authority)} of the spread of its actions (standard "
        f"deviation due to noise over the total; {measured.observations} observations, "
        f"{measured.noises} noises)"
    ]
    if measured.declared_inert:
        lines.append(f"{measured.declared_inert} noise entries are inert (masked by the policy)")
    if measured.inert_columns:
        dimensions = ", ".join(map(str, measured.inert_columns))
        lines.append(f"noise dimensions that change nothing: {dimensions}")
    if evaluations:
        return _diagnose_success(evaluations, constants, lines)
    if measured.authority < WEAK_AUTHORITY:
        advice = ["try it in its environment: --env.type="]
        return Diagnosis(False, f"hardly worth steering: {lines[0]}", advice)
    return Diagnosis(True, "can be steered: deterministic given its noise, and the noise matters", lines)


def percent(share: float) -> str:
    """A share in percent: ``100 %``, ``3.4 %``, ``0.05 %``; never in powers of ten."""
    value = 100 * share
    if abs(value) >= 10:
        return f"{value:.0f} %"
    return f"{value:.2g} %" if abs(value) >= 0.01 or value == 0 else "under 0.01 %"


def _diagnose_success(
    evaluations: dict[str, Evaluation], constants: Sequence[dict[str, Any]], lines: list[str]
) -> Diagnosis:
    base, others = evaluations["base"], {k: v for k, v in evaluations.items() if k != "base"}
    rates = {name: evaluation.summary() for name, evaluation in evaluations.items()}
    if not base.reported:
        lines = [*lines, *(f"return under {NAMES[name]}: {return_text(rates[name])}" for name in others)]
        return Diagnosis(
            True,
            "can be steered, by return: the environment reports no success; the base's return is "
            f"{return_text(rates['base'])}; use --noise.type=full --train.reward=env",
            lines,
            "full",
        )
    counted = [*rates.values(), *constants]
    if not sum(entry["successes"] for entry in counted):
        tried = sum(entry["episodes"] for entry in counted)
        return Diagnosis(
            False,
            f"nothing seen to learn from: no success in {tried} episodes under any noise (95 %: at most "
            f"{percent(wilson_interval(0, tried)[1])})",
            [*lines, "improve the base first (demonstrations), or reward progress instead of success"],
        )
    gains = {
        name: _Gain(*paired_difference(base.successes[: len(other.successes)], other.successes))
        for name, other in others.items()
    }
    success = rate_text(rates["base"])
    for name in WITHOUT_LEARNING:
        if name in others and rates[name]["ci95"][0] >= SOLVED and gains[name].worst > 0:
            said = f"{NAMES[name]} succeeds in {rate_text(rates[name])}, the base in {success}"
            return Diagnosis(True, f"needs no learning: {said}", lines, name)
    if rates["base"]["ci95"][0] >= SOLVED:
        return Diagnosis(True, f"can be steered, with little to gain: the base succeeds in {success}", lines)
    noise, few = "full", len(base.successes) < FEW
    if repeated := gains.get("repeated_noise"):
        if repeated.best < 0:
            lines.append(f"repeated noise costs success: {repeated}")
        elif not few and repeated.worst > -base.success_rate / 2:
            noise = "repeat"
            lines.append(
                f"repeated noise keeps at least half of the base's success: {repeated}; fewer dimensions"
            )
        else:
            lines.append(
                f"whether repeated noise keeps the base's success is open: {repeated}; raise "
                "--eval.n_episodes to find out, for it is learnt faster"
            )
    for name in ("zero_noise", "constant_noise"):
        if name in gains and gains[name].worst > 0:
            lines.append(f"{NAMES[name]} gains by itself: {gains[name]}")
    if "prior_noise" in gains and gains["prior_noise"].best < 0:
        lines.append(
            f"draws from its prior cost success ({gains['prior_noise']}), and an untrained actor starts "
            "there: keep --noise.bound small"
        )
    if few:
        lines.append(f"{len(base.successes)} episodes tell little; raise --eval.n_episodes")
    return Diagnosis(
        True, f"can be steered: the base succeeds in {success}; use --noise.type={noise}", lines, noise
    )


class _Gain(NamedTuple):
    """By how much another noise changes the base's success, on the same episodes, with its 95 % interval."""

    mean: float
    worst: float
    best: float

    def __str__(self) -> str:
        return f"{100 * self.mean:+.0f} points [{100 * self.worst:+.0f}, {100 * self.best:+.0f}]"


def as_json(measured: Steerability, diagnosis: Diagnosis) -> dict[str, Any]:
    """Measurements and diagnosis as JSON values; NaN and Inf, which JSON has not, become null."""
    values = {
        "steerable": diagnosis.steerable,
        "diagnosis": diagnosis.headline,
        "lines": diagnosis.lines,
        "noise_type": diagnosis.noise,
        "deterministic": measured.deterministic,
        "inert_columns": measured.inert_columns,
        **vars(measured),
        "seconds": {
            name: dict(zip(("median", "least", "most"), times)) for name, times in measured.seconds.items()
        },
    }
    return json.loads(json.dumps(values, default=Tensor.tolist), parse_constant=lambda name: None)
