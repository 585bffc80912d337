"""What every noise-space algorithm offers to the training loop."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import draccus
import torch
from torch import Tensor, nn

from trimtab.adapters import UserError
from trimtab.adapters.engine import ENGINES
from trimtab.policies.acting import ChunkPolicy
from trimtab.policies.critic import CriticEnsemble
from trimtab.policies.noise_samplers import prior_noise
from trimtab.policies.noise_space import NoiseSpace, NoiseSpaceConfig
from trimtab.policies.observe import ObserveConfig
from trimtab.rl.algorithms.acting import PLAIN_RUN, BehaviorPolicy, RunRequest
from trimtab.rl.algorithms.engines import PRECISIONS, Captured, make_engine, use_bfloat16
from trimtab.rl.data.replay import Batch
from trimtab.rl.data.returns import DISCOUNT_PER
from trimtab.rl.runs.processes import optimizers

MEASURED_EVERY = 10  # updates; what metrics take part in no loss
RANKED_EVERY = 50  # updates; metrics that cost as much as a step


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


@dataclass
class AlgorithmConfig(draccus.ChoiceRegistry, abc.ABC):
    """``--rl.type=...``: the algorithm and its settings."""

    # Discount per environment step, or per chunk where discount_per says so.
    gamma: float = 0.99
    # step: a chunk of k steps is discounted by gamma^k; chunk: by gamma, and its rewards are summed.
    discount_per: str = "step"
    # Whether the value of what follows counts after a time limit. After a terminal state it never does.
    bootstrap_at_time_limit: bool = True
    # Chunks in an n-step return.
    n_step: int = 3
    batch_size: int = 256
    learning_rate: float = 1e-3
    # Share of the learning rates that is left at the end of --train.env_steps; they fall linearly.
    learning_rate_end: float = 1.0
    # Share of the online networks that their targets take over at each update.
    tau: float = 0.005
    # Critic updates per actor update.
    actor_every: int = 2
    # Clip TD targets to the returns that the reward allows, as critic_loss=logistic always does.
    clip_targets: bool = True
    # Precision of the hidden layers' products while learning: float32 or bfloat16.
    precision: str = "float32"
    # How updates run: eager; compile: networks through torch.compile; cuda_graph: recorded and replayed.
    engine: str = "eager"

    # How early and how often it learns, where ``TrainConfig`` leaves that open; empty where it has no replay.
    pace: ClassVar[dict[str, Any]] = {
        "warmup_transitions": 800,
        "first_update": 256,
        "updates_per_transition": 2.0,
        "restart": 0.0,
    }

    def __post_init__(self) -> None:
        if not 0.0 <= self.gamma < 1.0:
            raise UserError("--rl.gamma", f"must be at least 0 and below 1, got {self.gamma}")
        self.require_positive("n_step", "batch_size", "learning_rate", "tau", "actor_every")
        if self.tau > 1.0:
            raise UserError("--rl.tau", f"is a share, at most 1, got {self.tau}")
        if not 0.0 < self.learning_rate_end <= 1.0:
            raise UserError(
                "--rl.learning_rate_end", f"is a share above 0 and at most 1, got {self.learning_rate_end}"
            )
        self.require_known(discount_per=DISCOUNT_PER, precision=PRECISIONS, engine=ENGINES)

    def require_positive(self, *names: str) -> None:
        """Raise a UserError for the first of ``names`` that is not a positive, finite number."""
        for name in names:
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise UserError(f"--rl.{name}", f"must be positive, got {value}")

    def require_known(self, **known: Sequence[str]) -> None:
        """Raise a UserError for the first named setting that is none of its values."""
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise UserError(f"--rl.{name}", f"'{getattr(self, name)}' is none of {', '.join(values)}")

    @property
    def candidates(self) -> int:
        """Noises per observation that the algorithm learns from, beside the one that acts."""
        return 0

    @property
    def replayed(self) -> tuple[str, ...]:
        """What the replay keeps for it, beside the transition: see ``rl.data.memory.replay_layout``."""
        return ("chunk", "candidates", "candidates_u", "next_candidates") if self.candidates else ()

    @property
    def type(self) -> str:
        return self.get_choice_name(self.__class__)

    def check(self, space: NoiseSpace, run: RunRequest = PLAIN_RUN) -> None:
        """Raise a UserError where it cannot learn in ``space`` or do what ``run`` asks, before long work."""

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

    def make_trainer(self, runner: Any, vec: Any, noise: NoiseSpaceConfig, seed: int, **options: Any) -> Any:
        """What runs the algorithm in the place of ``Trainer``, if anything."""
        return None

    @abc.abstractmethod
    def build(self, problem: Problem) -> Algorithm:
        """Build the algorithm for ``problem``."""


class Algorithm(nn.Module, BehaviorPolicy, abc.ABC):
    """Learns from replayed transitions how to act on a frozen policy.

    What comes from outside (``act``, ``update``, ``value``) holds observations as they are replayed,
    images packed; the losses take a batch after ``encode_batch``.

    Attributes:
        decode: the frozen policy on replayed conditioning, where ``config.replayed`` asks for that.
        critic: judges what was executed; networks named ``target_...`` follow those without it.
        bounds: what TD targets are clipped to, if anything.
        obstacle: why updates cannot be recorded as CUDA graphs, if so.
        updates: made so far.
    """

    config: Any  # of its own kind
    accelerator: Any
    critic: CriticEnsemble
    bounds: tuple[float, float] | None
    decode: Callable[..., Tensor] | None = None
    obstacle: str = ""
    updates: int

    def __init__(self, config: AlgorithmConfig, problem: Problem) -> None:
        super().__init__()
        config.check(problem.space)
        self.config, self.space, self.accelerator = config, problem.space, problem.accelerator
        self.updates = 0
        self._bfloat16 = use_bfloat16(config.precision, problem.accelerator.device)
        self._engine = make_engine(config.engine, self, problem.accelerator, self.obstacle)

    def encode_batch(self, batch: Batch) -> Batch:
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

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """``learn``, in the config's precision and by its engine; who acts does so in float32, eagerly."""
        # Without the cache: weights change within an update.
        with torch.autocast(
            self.accelerator.device.type, torch.bfloat16, enabled=self._bfloat16, cache_enabled=False
        ):
            if self._engine is None:
                metrics = self._update(batch)
            else:
                metrics = self._engine(self._update, batch, self.phase())
        self.updates += 1
        return metrics

    def _update(self, batch: Batch) -> dict[str, Tensor]:
        metrics = self.learn(self.encode_batch(batch))
        with torch.no_grad():
            for name, target in self.named_children():
                if name.startswith("target_"):
                    online = getattr(self, name.removeprefix("target_"))
                    now, latest = list(target.parameters()), list(online.parameters())
                    torch._foreach_lerp_(now, latest, self.config.tau)  # type: ignore[arg-type]
        return metrics

    def every(self, updates: int) -> bool:
        """Whether the coming update does what happens once in so many."""
        return self.updates % updates == 0

    def phase(self) -> tuple[int, ...]:
        """What the coming update does: those of equal phases run the same operations."""
        return tuple(self.every(n) for n in (self.config.actor_every, MEASURED_EVERY, RANKED_EVERY))

    @abc.abstractmethod
    def learn(self, batch: Batch) -> dict[str, Tensor]:
        """One step of all that learns, from a batch after ``encode_batch``; targets follow by themselves.

        Metrics are detached scalars, not yet synchronised.
        """

    def critic_loss(self, batch: Batch, target: Tensor) -> tuple[Tensor, Tensor]:
        """Of the TD error, summed over the members, averaged over the batch; and the values (E, B)."""
        return self.critic.regress(batch["features"], batch["chunk"], target)

    def bootstrap(self, batch: Batch, value: Tensor) -> Tensor:
        """``R + D * value``, (B,), clipped to ``bounds``."""
        target = batch["reward"] + batch["discount"] * value
        return target if self.bounds is None else target.clamp(*self.bounds)

    def imitation_loss(self, batch: Batch) -> Tensor:
        """``-E[log pi(u | s)]`` over the rows ``imitated``, times its weight; 0 where there are none.

        Their ``u`` is the noise of what a person did. Its gradient reaches the actor alone. In nats, as the
        divergence from the prior, which holds the deviation up where there are few of them.
        """
        marked = batch["imitated"]  # (B, 1)
        u = torch.where(marked > 0.0, batch["u"], 0.0)  # NaN in a demonstration
        loss = -self.actor.log_prob(batch["features"].detach(), u)
        return self.config.imitation_weight * (marked[:, 0] * loss).sum() / marked.sum().clamp_min(1.0)

    def q_statistics(self, values: Tensor) -> dict[str, Tensor]:
        """Metrics of the critic's ``values`` on a batch, now and then."""
        if not self.every(MEASURED_EVERY):
            return {}
        low, high = values.aminmax()
        return {"q_mean": values.mean(), "q_min": low, "q_max": high}

    @torch.no_grad()
    def value(self, features: Tensor, u: Tensor, chunks: Tensor) -> Tensor:
        """The critic's estimate (B,) of the return, for diagnostics.

        ``features`` (B, d) were seen; it looks at the noises ``u`` (B, dim), or at ``chunks`` (B, steps *
        action_dim), which were executed.
        """
        return self.critic(self.actor.encoder(features), chunks).mean(0)

    def fit_normalizer(self, features: Tensor) -> None:
        """Take the statistics that standardise the observation features."""
        network: Any
        for network in self.children():
            network.normalizer.fit(features.to(self.accelerator.device))

    def begin_at(self, value: float) -> None:
        """Let critics that learn between bounds begin with this value, and not in the bounds' middle."""
        for network in self.children():
            if isinstance(network, CriticEnsemble):
                network.begin_at(value)

    def progress(self, share: float) -> None:
        """Let the learning rates fall linearly, once ``share`` of the run's environment steps are made."""
        rate = self.config.learning_rate * (1.0 - min(share, 1.0) * (1.0 - self.config.learning_rate_end))
        for group in (group for optimizer in optimizers(self).values() for group in optimizer.param_groups):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def training_state(self) -> dict[str, Any]:
        """Networks, temperature, normalisers, counters and what optimisers hold, to go on learning from."""
        counters = {name: value for name, value in vars(self).items() if type(value) is int}
        states = {name: optimizer.state_dict()["state"] for name, optimizer in optimizers(self).items()}
        return {"tensors": self.state_dict(), "counters": counters, "optimizers": states}

    def load_training_state(self, state: dict[str, Any]) -> None:
        """The inverse of ``training_state``; an optimiser's settings are the config's."""
        self.load_state_dict(state["tensors"])
        vars(self).update(state["counters"])
        for name, optimizer in optimizers(self).items():
            by_index = {int(index): dict(entry) for index, entry in state["optimizers"][name].items()}
            optimizer.load_state_dict(optimizer.state_dict() | {"state": by_index})

    def _adam(self, *parts: nn.Module | nn.Parameter) -> torch.optim.Adam:
        """A fused Adam over the parameters of ``parts``, which are moved to the learner's device."""
        self.to(self.accelerator.device)
        parameters = [
            p for part in parts for p in (part.parameters() if isinstance(part, nn.Module) else (part,))
        ]
        rate: float | Tensor = self.config.learning_rate
        captured = isinstance(self._engine, Captured)
        if captured:  # a graph keeps a number as it was recorded, and reads a tensor anew
            rate = torch.tensor(rate, device=self.accelerator.device)
        return torch.optim.Adam(parameters, rate, fused=True, capturable=captured)

    def _step(self, optimizer: torch.optim.Adam, loss: Tensor) -> None:
        """One step down ``loss``."""
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """Within, no gradient reaches the parameters of ``network``; it passes through what they compute."""
    network.requires_grad_(False)
    try:
        yield
    finally:
        network.requires_grad_(True)
