"""What every noise-space algorithm offers to the training loop."""

from __future__ import annotations

import abc
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any, ClassVar, Self

import draccus
import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn

from trimtab.adapters import UserError
from trimtab.policies.acting import ChunkPolicy
from trimtab.policies.compiling import CompiledPasses
from trimtab.policies.noise_samplers import prior_noise
from trimtab.policies.noise_space import NoiseSpace, NoiseSpaceConfig
from trimtab.policies.observe import ObserveConfig
from trimtab.policies.passes import matmuls_in, passes_by
from trimtab.policies.precision import matmul_dtype, require_precision
from trimtab.rl.algorithms.acting import PLAIN_RUN, Acting, RunRequest
from trimtab.rl.algorithms.capture import CapturedUpdate, why_not_captured
from trimtab.rl.algorithms.optimizer import FusedAdam
from trimtab.rl.data.replay import Batch
from trimtab.rl.data.returns import DISCOUNT_PER
from trimtab.rl.runs.processes import optimizers

MEASURED_EVERY = 10  # updates; what metrics take part in no loss
RANKED_EVERY = 50  # updates; metrics that cost as much as a step
ENGINES = ("eager", "compile", "cuda_graph")
# Of an optimiser's groups: its weights are the algorithm's, its rate follows from the steps of the run.
UNSAVED = "params", "lr"
PLAIN = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


@dataclass(frozen=True)
class Problem:
    """What an algorithm is built for.

    Attributes:
        feature_dim: length of the observation features, without pixels.
        space: noise space.
        accelerator: an ``accelerate.Accelerator``.
        bounds: smallest and largest possible return, or ``None``.
        chunk_size: numbers in a chunk, steps * action_dim.
        observe: a resolved config, where there are images to look at.
    """

    feature_dim: int
    space: NoiseSpace
    accelerator: Any
    bounds: tuple[float, float] | None
    chunk_size: int = 0
    observe: ObserveConfig | None = None


@dataclass(frozen=True)
class Pace:
    """How early and how often an algorithm learns, where ``TrainConfig`` leaves it open."""

    warmup_transitions: int = 800
    first_update: int = 256
    updates_per_transition: float = 2.0


@dataclass
class AlgorithmConfig(draccus.ChoiceRegistry, abc.ABC):
    """``--rl.type=...``: the algorithm and its settings."""

    # Discount per environment step, or per chunk where discount_per says so.
    gamma: float = 0.99
    # step: a chunk of k steps is discounted by gamma^k; chunk: by gamma, and its rewards are summed.
    discount_per: str = "step"
    # Whether what follows a time limit has a value, as what follows a terminal state has not.
    bootstrap_at_time_limit: bool = True
    # Chunks in an n-step return.
    n_step: int = 3
    batch_size: int = 256
    # Share of the learning rates that is left at the end of --train.env_steps, to which they fall linearly.
    learning_rate_end: float = 1.0
    # In what the networks' hidden layers are multiplied while learning: float32 or bfloat16.
    precision: str = "float32"
    # How updates run: eager; compile: networks through torch.compile; cuda_graph: recorded and replayed.
    engine: str = "eager"

    def __post_init__(self) -> None:
        if not 0.0 <= self.gamma < 1.0:
            raise UserError("--rl.gamma", f"must be at least 0 and below 1, got {self.gamma}")
        if self.discount_per not in DISCOUNT_PER:
            known = ", ".join(DISCOUNT_PER)
            raise UserError("--rl.discount_per", f"'{self.discount_per}' is none of {known}")
        require_positive(self, "n_step", "batch_size")
        if not 0.0 < self.learning_rate_end <= 1.0:
            raise UserError(
                "--rl.learning_rate_end", f"is a share above 0 and at most 1, got {self.learning_rate_end}"
            )
        require_precision("--rl.precision", self.precision)
        if self.engine not in ENGINES:
            raise UserError("--rl.engine", f"'{self.engine}' is none of {', '.join(ENGINES)}")

    @property
    def pace(self) -> Pace:
        """Its own."""
        return Pace()

    @property
    def candidates(self) -> int:
        """Noises per observation that the algorithm learns from, beside the one that acts."""
        return 0

    @property
    def replayed(self) -> tuple[str, ...]:
        """What the replay keeps for it, beside the transition: see ``train.replay_extra``."""
        return ("chunk", "candidates", "candidates_u", "next_candidates") if self.candidates else ()

    @property
    def type(self) -> str:
        return self.get_choice_name(self.__class__)

    # Whether it learns from a replay of transitions; one that does not runs itself (``own_run``).
    replays: ClassVar[bool] = True

    def check(self, space: NoiseSpace, run: RunRequest = PLAIN_RUN) -> None:
        """Raise a UserError where the algorithm cannot do what is asked; asked before any long work.

        Args:
            space: that it is to learn in.
            run: what else is asked of it.
        """

    def untrained(self, space: NoiseSpace) -> ChunkPolicy | None:
        """What acts before anything is learnt; ``None``: the base as it is."""
        return prior_noise(space)

    def without_success(self, reward: str) -> tuple[str, str] | None:
        """Option and mend, where it cannot learn from ``reward`` and no success is reported."""
        mend = "--train.reward", "--train.reward=env learns from its own reward"
        return None if reward == "env" else mend

    def within(self, env_steps: int, episode_steps: Callable[[], int]) -> Self:
        """This config, its budget cut to ``env_steps`` of episodes of at most ``episode_steps()``."""
        return self

    def own_run(self, runner: Any, vec: Any, noise: NoiseSpaceConfig, seed: int, **options: Any) -> Any:
        """What runs the algorithm in the place of ``Trainer``, if anything."""
        return None

    @abc.abstractmethod
    def build(self, problem: Problem) -> Algorithm:
        """Build the algorithm for ``problem``."""


def require_positive(config: Any, *names: str) -> None:
    """Raise a UserError for the first of ``names`` that is not a positive, finite number."""
    for name in names:
        value = getattr(config, name)
        if not (value > 0 and math.isfinite(value)):
            raise UserError(f"--rl.{name}", f"must be positive, got {value}")


class Algorithm(nn.Module, Acting, abc.ABC):
    """Learns from replayed transitions how to act on a frozen policy.

    What comes from outside (``act``, ``update``, ``value``) holds observations as they are replayed,
    images packed; the losses take a batch after ``look``.

    Args:
        config: settings.
        problem: what it learns for.

    Attributes:
        decode: the frozen policy on replayed conditioning, where ``config.replayed`` asks for that.
        matmul_dtype: of hidden layers within ``update``, see ``passes.matmuls_in``.
        learning_rate_end: see ``progress``.
        obstacle: why updates cannot be recorded as CUDA graphs, if so.
        updates: made so far.
    """

    accelerator: Any
    decode: Callable[..., Tensor] | None = None
    matmul_dtype: torch.dtype | None = None
    obstacle: str = ""
    updates: int
    learning_rate_end: float = 1.0
    _rates: list[tuple[FusedAdam, float]]
    _compiled: CompiledPasses | None = None
    _captured: CapturedUpdate | None = None

    def __init__(self, config: AlgorithmConfig, problem: Problem) -> None:
        super().__init__()
        self.config, self.space, self.accelerator = config, problem.space, problem.accelerator
        self.updates = 0
        self.learning_rate_end, self._rates = config.learning_rate_end, []

    def _set_up(self) -> None:
        """Move what has been built to the device, and settle in what it multiplies."""
        config, accelerator = self.config, self.accelerator
        self.to(accelerator.device)
        self.matmul_dtype = matmul_dtype("--rl.precision", config.precision, accelerator.device)
        option = f"--rl.engine={config.engine}"
        if config.engine == "compile":
            self._compiled = CompiledPasses(option)
        elif config.engine == "cuda_graph":
            why_not = why_not_captured(accelerator, self.obstacle)
            if why_not:
                print(f"{option}: {why_not}; updates run as they are", file=sys.stderr)
            else:
                self._captured = CapturedUpdate(option, accelerator.device)

    def look(self, batch: Batch) -> Batch:
        """The batch with its observations encoded, images shifted at random; as it is without images.

        As in DrQ-v2 (arXiv 2107.09645) both states are seen by the encoder as it is now, and only that of
        the TD loss' own state carries a gradient. Whatever else is learnt from it takes it detached.
        """
        encoder = self.actor.encoder
        if encoder.image_shape is None:
            return batch
        with torch.no_grad():
            following = encoder(batch["next_features"], augment=True)
        return batch | {"features": encoder(batch["features"], augment=True), "next_features": following}

    @abc.abstractmethod
    def turn(self) -> tuple[int, ...]:
        """What the coming update does: those of equal turns run the same operations."""

    @abc.abstractmethod
    def update(self, batch: Batch) -> dict[str, Tensor]:
        """One gradient step. Metrics come back as detached scalars, not yet synchronised."""

    @abc.abstractmethod
    def value(self, features: Tensor, u: Tensor, chunks: Tensor) -> Tensor:
        """The critic's estimate (B,) of the return, for diagnostics.

        Args:
            features: (B, d).
            u: (B, dim) noises, and
            chunks: (B, steps * action_dim) what was executed; it looks at either.
        """

    @abc.abstractmethod
    def fit_normalizer(self, features: Tensor) -> None:
        """Take the statistics that standardise the observation features."""

    def progress(self, share: float) -> None:
        """Let the learning rates fall: linearly, to ``config.learning_rate_end`` of what they were.

        Args:
            share: of the run's environment steps that have been made; more than all of them count as all.
        """
        if self.learning_rate_end == 1.0:
            return
        factor = 1.0 - min(share, 1.0) * (1.0 - self.learning_rate_end)
        for optimizer, rate in self._rates:
            for group in optimizer.param_groups:
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(factor * rate)
                else:
                    group["lr"] = factor * rate

    def training_state(self) -> dict[str, Any]:
        """Networks, temperature, normalisers, counters and optimisers, to go on learning from."""
        counters = {name: value for name, value in vars(self).items() if type(value) is int}
        states: dict[str, Any] = {}
        for name, optimizer in optimizers(self).items():
            state = optimizer.state_dict()
            groups = [{k: v for k, v in group.items() if k not in UNSAVED} for group in state["param_groups"]]
            states[name] = {"state": state["state"], "groups": groups}
        return {"tensors": self.state_dict(), "counters": counters, "optimizers": states}

    def load_training_state(self, state: dict[str, Any]) -> None:
        """The inverse of ``training_state``."""
        self.load_state_dict(state["tensors"])
        for name, value in state["counters"].items():
            setattr(self, name, value)
        for name, optimizer in optimizers(self).items():
            saved, now = state["optimizers"][name], optimizer.state_dict()
            for group, settings in zip(now["param_groups"], saved["groups"], strict=True):
                # A tuple (Adam's betas) comes back as a list.
                group |= {k: tuple(v) if isinstance(group[k], tuple) else v for k, v in settings.items()}
            by_index = {int(index): dict(entry) for index, entry in saved["state"].items()}
            optimizer.load_state_dict({"state": by_index, "param_groups": now["param_groups"]})

    def _adam(self, learning_rate: float, *parts: nn.Module | nn.Parameter) -> Any:
        """A fused Adam over the parameters of ``parts``, prepared by the accelerator."""
        parameters = [
            parameter
            for part in parts
            for parameter in (part.parameters() if isinstance(part, nn.Module) else (part,))
        ]
        rate: float | Tensor = learning_rate
        if self._captured is not None and self.learning_rate_end != 1.0:
            # A graph keeps a number as it was recorded, and reads a tensor anew.
            rate = torch.tensor(learning_rate, device=self.accelerator.device)
        optimizer = FusedAdam(parameters, rate)
        self._rates.append((optimizer, learning_rate))
        return self.accelerator.prepare_optimizer(optimizer)

    def _step(self, optimizer: Any, loss: Tensor) -> None:
        """One step down ``loss``.

        Where no gradient is scaled and no other engine takes over, Accelerate's wrappers of backward and step
        add nothing but a look for a package on the disk each time: there they are left out.
        """
        accelerator = self.accelerator
        plain = accelerator.scaler is None and accelerator.distributed_type in PLAIN
        plain = plain and accelerator.gradient_accumulation_steps == 1
        optimizer = optimizer.optimizer if plain else optimizer
        optimizer.zero_grad(set_to_none=True)
        loss.backward() if plain else accelerator.backward(loss)
        optimizer.step()


def as_set_up(
    update: Callable[[Any, Batch], dict[str, Tensor]],
) -> Callable[[Any, Batch], dict[str, Tensor]]:
    """An ``update`` in the algorithm's precision and by its engine; who acts does so in float32, eagerly."""

    @wraps(update)
    def within(self: Algorithm, batch: Batch) -> dict[str, Tensor]:
        with matmuls_in(self.matmul_dtype), passes_by(self._compiled):
            return update(self, batch) if self._captured is None else self._captured(self, update, batch)

    return within


@contextmanager
def frozen(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Within, no gradient reaches ``parameters``; it passes through what they compute."""
    held = list(parameters)
    for parameter in held:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in held:
            parameter.requires_grad_(True)


def spread(values: Tensor, updates: int) -> dict[str, Tensor]:
    """Metrics of a critic's ``values`` on a batch, at every tenth update."""
    if updates % MEASURED_EVERY:
        return {}
    low, high = values.aminmax()
    return {"q_mean": values.mean(), "q_min": low, "q_max": high}


@torch.no_grad()
def polyak(target: nn.Module, source: nn.Module, tau: float) -> None:
    """Move ``target`` a fraction ``tau`` towards ``source``."""
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), tau)
