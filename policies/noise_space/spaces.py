"""The noise spaces: what each steers, and how it is asked for."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.adapters import NoiseSpec, UserError
from trimtab.policies.noise_space.base import NoiseSpace, NoiseSpaceConfig

RANGE = re.compile(r"(\d*):(\d*)")


def rows_and_columns(spec: NoiseSpec, option: str, wish: str) -> tuple[int, int]:
    """(steps, dim) of noise that has both, or a UserError that ``wish`` at ``option`` needs them."""
    if len(spec.shape) != 2:
        raise UserError(option, f"{wish} needs noise of shape (steps, dim), this has {spec.shape}")
    return spec.shape


def full_or_repeat(option: str, value: str) -> None:
    """Raise a UserError unless ``value`` is one of the two."""
    if value not in ("full", "repeat"):
        raise UserError(option, f"'{value}' is neither full nor repeat")


@NoiseSpaceConfig.register_subclass("full")
@dataclass
class FullNoiseConfig(NoiseSpaceConfig):
    """The actor chooses every entry of the noise."""

    def build_unscaled(self, spec: NoiseSpec) -> FullNoiseSpace:
        return FullNoiseSpace(spec, spec.size, self.bound)


class FullNoiseSpace(NoiseSpace):
    """``u`` is the whole noise, flattened."""

    def _noise(self, u: Tensor, prior: Tensor) -> Tensor:
        return u.unflatten(1, self.spec.shape)

    def _steered(self, noise: Tensor, prior: Tensor | None) -> Tensor:
        return noise.flatten(1)


@NoiseSpaceConfig.register_subclass("repeat")
@dataclass
class RepeatNoiseConfig(NoiseSpaceConfig):
    """One vector, repeated over the steps of the chunk: few dimensions to learn.

    Not every policy works under repeated noise: compare its success before choosing this.
    """

    def build_unscaled(self, spec: NoiseSpec) -> RepeatNoiseSpace:
        _, dim = rows_and_columns(spec, "--noise.type", "repeat")
        return RepeatNoiseSpace(spec, dim, self.bound)


class RepeatNoiseSpace(NoiseSpace):
    """``u`` is the noise of one step; all steps get it."""

    def _noise(self, u: Tensor, prior: Tensor) -> Tensor:
        return u.unsqueeze(1).repeat(1, self.spec.shape[0], 1)

    def _steered(self, noise: Tensor, prior: Tensor | None) -> Tensor:
        return noise[:, 0]


@NoiseSpaceConfig.register_subclass("constant")
@dataclass
class ConstantNoiseConfig(NoiseSpaceConfig):
    """One noise for every observation (a golden ticket): the actor does not look.

    Before training that one distribution is the prior; learning narrows it to one noise.
    """

    # ``full``, or ``repeat`` for one vector over the steps of the chunk.
    ticket: str = "full"

    def __post_init__(self) -> None:
        super().__post_init__()
        full_or_repeat("--noise.ticket", self.ticket)

    def build_unscaled(self, spec: NoiseSpec) -> NoiseSpace:
        space: NoiseSpace = FullNoiseSpace(spec, spec.size, self.bound)
        if self.ticket == "repeat":
            _, dim = rows_and_columns(spec, "--noise.ticket", "repeat")
            space = RepeatNoiseSpace(spec, dim, self.bound)
        space.uses_features = False
        return space


@NoiseSpaceConfig.register_subclass("knots")
@dataclass
class KnotNoiseConfig(NoiseSpaceConfig):
    """``knots`` vectors, the first at the chunk's first step, the last at its last, interpolated between.

    1 is ``repeat``, as many as the noise has steps is ``full``. As with ``repeat``, steps are correlated,
    which the policy never met: compare its success.
    """

    # How many.
    knots: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.knots < 1:
            raise UserError("--noise.knots", f"must be at least 1, got {self.knots}")

    def build_unscaled(self, spec: NoiseSpec) -> KnotNoiseSpace:
        steps, dim = rows_and_columns(spec, "--noise.type", "knots")
        if self.knots > steps:
            raise UserError("--noise.knots", f"this policy's noise has {steps} steps, got {self.knots} knots")
        return KnotNoiseSpace(spec, self.knots * dim, self.bound, knot_weights(self.knots, steps))


def knot_weights(knots: int, steps: int) -> Tensor:
    """(steps, knots) weights of linear interpolation, each row of length 1 in the L2 norm.

    Plain interpolation halves the variance between two independent knots; so scaled it is 1 at every step,
    and steps correlate as ``weights @ weights.T``.
    """
    position = torch.linspace(0.0, knots - 1.0, steps, dtype=torch.float64)
    weights = (1.0 - (position[:, None] - torch.arange(knots)).abs()).clamp_min(0.0)
    return weights / weights.norm(dim=1, keepdim=True)


class KnotNoiseSpace(NoiseSpace):
    """``u`` is (knots, dim), flattened.

    The bound holds for ``u``; between two knots that agree, the noise reaches sqrt(2) times as far.
    """

    def __init__(self, spec: NoiseSpec, dim: int, bound: float, weights: Tensor) -> None:
        super().__init__(spec, dim, bound)
        self.weights = weights.float()
        self.inverse = torch.linalg.pinv(weights).float()

    def _noise(self, u: Tensor, prior: Tensor) -> Tensor:
        return self.weights.to(u) @ u.unflatten(1, (-1, self.spec.shape[1]))

    def _steered(self, noise: Tensor, prior: Tensor | None) -> Tensor:
        """For noise from elsewhere: the knots that come nearest to it (least squares)."""
        return (self.inverse.to(noise.device) @ noise.to(self.inverse.dtype)).flatten(1)


@NoiseSpaceConfig.register_subclass("masked")
@dataclass
class MaskedNoiseConfig(NoiseSpaceConfig):
    """Only the entries that can change the executed actions, or those of the given rows and columns.

    The others are drawn afresh from the prior for every chunk.
    """

    # Steps to steer, such as ``0:8`` (0 to 7), ``:8`` or ``0:2,6:8``; default: all.
    rows: str | None = None
    # Dimensions to steer, likewise.
    columns: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rows", "columns"):
            _ranges(f"--noise.{name}", getattr(self, name))

    def build_unscaled(self, spec: NoiseSpec) -> MaskedNoiseSpace:
        steered = torch.ones(spec.shape, dtype=torch.bool) if spec.live is None else spec.live.cpu().clone()
        for axis, name in enumerate(("rows", "columns")):
            text = getattr(self, name)
            if text is None:
                continue
            option = f"--noise.{name}"
            length = rows_and_columns(spec, option, name)[axis]
            named = torch.zeros(length, dtype=torch.bool)
            for start, stop in _ranges(option, text):
                if (stop or length) > length or start >= length:
                    raise UserError(option, f"this policy's noise has {length} {name}, got {text}")
                named[start:stop] = True
            steered &= named.unsqueeze(1 - axis)
        if not steered.any():
            option = "--noise.columns" if self.columns else "--noise.rows"
            raise UserError(option, "none of these entries can change what this policy does")
        return MaskedNoiseSpace(spec, steered, self.bound)


def _ranges(option: str, text: str | None) -> list[tuple[int, int | None]]:
    """``0:2,6:`` -> [(0, 2), (6, None)]."""
    found = []
    for part in [] if text is None else str(text).split(","):
        match = RANGE.fullmatch(part.strip())
        if match is None:
            # YAML, which reads options too, takes 1:8 for 68 (base 60).
            hint = "; write 01:8 for 1:8, which YAML takes for a number" if part.strip().isdigit() else ""
            raise UserError(option, f"'{text}' is no range such as 0:8 or 0:2,6:8{hint}")
        start, stop = int(match[1] or 0), int(match[2]) if match[2] else None
        if stop is not None and stop <= start:
            raise UserError(option, f"{part.strip()} is empty; a range runs up to, not including, its end")
        found.append((start, stop))
    return found


class MaskedNoiseSpace(NoiseSpace):
    """``u`` holds the entries that the mask ``steered`` names, in the order of the flattened noise."""

    determines_noise = False

    def __init__(self, spec: NoiseSpec, steered: Tensor, bound: float) -> None:
        self.steered = steered
        self._index = steered.flatten().nonzero().squeeze(1)
        super().__init__(spec, len(self._index), bound)

    def _noise(self, u: Tensor, prior: Tensor) -> Tensor:
        rest = self.unsteered(prior).flatten(1)
        return rest.index_copy(1, self._index.to(u.device), u.to(rest.dtype)).unflatten(1, self.spec.shape)

    def _steered(self, noise: Tensor, prior: Tensor | None) -> Tensor:
        return self.draw(noise)

    def draw(self, prior: Tensor) -> Tensor:
        return prior.flatten(1)[:, self._index.to(prior.device)]


@NoiseSpaceConfig.register_subclass("residual")
@dataclass
class ResidualNoiseConfig(NoiseSpaceConfig):
    """``eps + delta(s)``: a whole draw from the prior, fresh for every chunk, moved by a bounded delta.

    The gentlest space: the noise keeps the prior's spread whatever the actor learns, so it stays near what
    the policy was trained on, and no single noise can be enforced. ``u`` is delta: neither the actor nor a
    critic of ``u`` sees eps.
    """

    # Of delta, in standard deviations of the prior.
    bound: float = 1.0
    # ``repeat``, one vector over the steps of the chunk, or ``full``.
    delta: str = "repeat"
    # Deviation of delta before training; its mean is 0. The noise then has variance 1 + start^2, and with
    # ``repeat`` its steps correlate by start^2 / (1 + start^2).
    start: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        full_or_repeat("--noise.delta", self.delta)
        if not 0.0 < self.start <= self.bound:
            raise UserError("--noise.start", f"must be above 0 and at most the bound, got {self.start}")

    def build_unscaled(self, spec: NoiseSpec) -> ResidualNoiseSpace:
        repeat = self.delta == "repeat"
        dim = rows_and_columns(spec, "--noise.delta", "repeat")[1] if repeat else spec.size
        return ResidualNoiseSpace(spec, dim, self.bound, repeat, self.start)


class ResidualNoiseSpace(NoiseSpace):
    """``u`` is delta."""

    determines_noise = False

    def __init__(self, spec: NoiseSpec, dim: int, bound: float, repeat: bool, start: float) -> None:
        super().__init__(spec, dim, bound)
        self.repeat = repeat
        self.initial_std = start

    def _noise(self, u: Tensor, prior: Tensor) -> Tensor:
        return self.unsteered(prior) + (u.unsqueeze(1) if self.repeat else u.unflatten(1, self.spec.shape))

    def _steered(self, noise: Tensor, prior: Tensor | None) -> Tensor:
        """Exact for noise from ``expand``; for other noise the delta that comes nearest, less the clip."""
        if prior is None:
            raise ValueError("what residual noise adds to the prior can be told with the prior only")
        delta = noise.float() - self.unsteered(prior).float()
        return delta.mean(1) if self.repeat else delta.flatten(1)

    def draw(self, prior: Tensor) -> Tensor:
        """A second draw, independent of ``prior`` but decided by it: seeded by a hash of each row's bits."""
        rows = prior.detach().float().flatten(1).cpu().contiguous().numpy()
        drawn = torch.empty(len(rows), self.dim)
        generator = torch.Generator()
        for row, out in zip(rows, drawn, strict=True):
            digest = hashlib.blake2b(row.tobytes(), digest_size=8).digest()
            generator.manual_seed(int.from_bytes(digest, "little"))
            out.normal_(generator=generator)
        return drawn.to(prior.device)
