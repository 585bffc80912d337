"""DSRL-NA: an action critic learns by TD, a noise critic is distilled from it, the noise actor climbs that.

Source: Wagenmaker et al., arXiv 2506.15799, Algorithm 1 ("noise aliasing": many noises make the same chunk,
and a critic of chunks shares what it learns among them). Two modes (``dsrl_na.md``):

``stored``, the default, never calls the frozen policy while learning: the (noise, chunk) pairs are those that
the collector decoded. At s' nothing decodes the actor's noise: the target noise critic judges the noise
itself, or one stored pair stands for it, drawn with weights ``w_k ~ pi(u_k | s') / p(u_k)`` (sampling
importance resampling, Rubin 1988; the pairs come from the prior p).

``exact`` is the paper's: the frozen policy decodes the actor's noise at s' and fresh noises to distil on,
from conditioning that the replay keeps.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from trimtab.adapters import UserError
from trimtab.adapters.errors import at_least
from trimtab.policies.actor import ActorOutput, kl_to_prior
from trimtab.policies.critic import CriticEnsemble
from trimtab.policies.noise_space import NoiseSpace
from trimtab.rl.algorithms.acting import PLAIN_RUN, RunRequest
from trimtab.rl.algorithms.base import RANKED_EVERY, AlgorithmConfig, Problem
from trimtab.rl.algorithms.dsrl_sac import SoftActorCritic, SoftConfig
from trimtab.rl.data.replay import Batch

MODES = ("stored", "exact")
BOOTSTRAPS = ("importance", "noise_critic")
REGULARIZERS = ("prior", "entropy")
RANKED = 8  # noises per state that are decoded to rank them, in exact mode, and
RANKED_STATES = 32  # of how many states


def check_pairs(config: Any, space: NoiseSpace, run: RunRequest) -> None:
    """Raise a UserError where ``u`` does not tell the noise, so that a chunk is not its doing alone.

    Or where the noise of a person's chunks is to be imitated, and the policy does not tell it.
    """
    if config.imitation_weight and not run.inverts:
        raise UserError(
            "--rl.imitation_weight",
            "this policy's chunks cannot be turned back into noise (diffusion, pi0, pi05, smolvla and eo1 "
            "can); leave it at 0",
        )
    if not space.determines_noise:
        raise UserError(
            "--noise.type",
            f"{config.type} distils which noise made which chunk, which this space cannot express; use full, "
            "repeat or knots, or dsrl_sac",
        )


def pick(values: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` (B, m) of ``values`` (B, K, dim): (B, m, dim)."""
    return values.gather(1, index.unsqueeze(-1).expand(-1, -1, values.shape[-1]))


@torch.no_grad()
def rank_correlation(
    noise_critic: CriticEnsemble, critic: CriticEnsemble, features: Tensor, u: Tensor, chunks: Tensor
) -> Tensor:
    """Mean over states of Spearman's correlation of ``Q^W(s, u_k)`` and ``Q^A(s, a_k)`` over the pairs.

    Within a state: over all states together the value of the state alone makes it look perfect. Members are
    averaged; features (B, d), pairs (B, K, dim) and (B, K, steps * action_dim).
    """
    noise = noise_critic(features, u).mean(0)
    action = critic(features, chunks).mean(0)
    first, second = (values.argsort(1).argsort(1).float() for values in (noise, action))
    first, second = first - first.mean(1, keepdim=True), second - second.mean(1, keepdim=True)
    return ((first * second).sum(1) / (first.norm(dim=1) * second.norm(dim=1)).clamp_min(1e-9)).mean()


@AlgorithmConfig.register_subclass("dsrl_na")
@dataclass
class DSRLNAConfig(SoftConfig):
    """Settings of DSRL-NA."""

    # Chunks in an n-step return.
    n_step: int = 10
    # stored: learn from the pairs that the collector decoded; exact: ask the frozen policy while learning.
    mode: str = "stored"
    # stored: what values the actor's noise at the next state. noise_critic: the noise critic; importance:
    # the action critic, on a stored candidate drawn by how much likelier the actor makes it than the prior.
    bootstrap: str = "noise_critic"
    # stored: candidates decoded for each observation.
    num_candidates: int = 16
    # Distillation steps per update (0.5: one every second), and the noises per state in each.
    distillation_steps: float = 0.5
    distilled_pairs: int = 1
    # exact: MiB that the conditioning in the replay may take.
    conditioning_limit: float = 4096.0
    # Penalty of the actor: prior (its divergence from the base's noise) or entropy (as in SAC).
    regularizer: str = "prior"
    # Its weight in units of return per nat. Fixed: if it falls, the actor exploits the noise critic.
    initial_temperature: float = 0.03
    learn_temperature: bool = False
    # Weight of -log pi of the noises that would have made a person's chunks (--teleop.type), in units of
    # return per nat; 0: off. Few chunks have such a noise: see recipes/configs/your_robot/README.md.
    imitation_weight: float = 0.0

    pace: ClassVar[dict[str, Any]] = AlgorithmConfig.pace | {"warmup_transitions": 0, "first_update": 64}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("num_candidates", "distillation_steps", "distilled_pairs", "conditioning_limit")
        self.require_known(mode=MODES, bootstrap=BOOTSTRAPS, regularizer=REGULARIZERS)
        if self.regularizer == "prior" and (self.learn_temperature or self.backup_entropy):
            raise UserError(
                "--rl.regularizer",
                "prior has a fixed weight and no entropy in the backup; learn_temperature and backup_entropy "
                "go with entropy",
            )
        if self.mode == "stored" and self.distilled_pairs > self.num_candidates:
            raise UserError("--rl.distilled_pairs", f"at most num_candidates={self.num_candidates}")
        at_least(0, self, "--rl.", "imitation_weight")

    @property
    def candidates(self) -> int:
        return self.num_candidates if self.mode == "stored" else 0

    @property
    def replayed(self) -> tuple[str, ...]:
        marks = ("imitated",) if self.imitation_weight else ()
        if self.mode == "exact":
            return "chunk", "conditioning", *marks
        following = ("next_candidates", "next_candidates_u") if self.bootstrap == "importance" else ()
        return "chunk", "candidates", "candidates_u", *following, *marks

    def check(self, space: NoiseSpace, run: RunRequest = PLAIN_RUN) -> None:
        check_pairs(self, space, run)

    def build(self, problem: Problem) -> DSRLNA:
        return DSRLNA(self, problem)


class DSRLNA(SoftActorCritic):
    """See the module's docstring.

    Attributes:
        base_calls: how often the learner asked the frozen policy, in batches; 0 in stored mode.
        importance: whether a stored candidate stands for the actor's noise at the next state.
    """

    config: DSRLNAConfig

    def __init__(self, config: DSRLNAConfig, problem: Problem) -> None:
        super().__init__(config, problem, problem.chunk_size)
        self.noise_critic = CriticEnsemble(
            self.actor.encoder.dim, problem.space.dim, config.critic, self.critic.bounds
        )
        self.noise_optimizer = self._adam(self.noise_critic)
        self.exact, self.base_calls = config.mode == "exact", 0
        self.importance = not self.exact and config.bootstrap == "importance"
        if not self.exact and not self.importance:
            self.target_noise_critic = copy.deepcopy(self.noise_critic).requires_grad_(False)

    @property
    def obstacle(self) -> str:
        return "the learner asks the frozen policy (rl.mode=exact)" if self.config.mode == "exact" else ""

    @property
    def actor_critic(self) -> CriticEnsemble:
        return self.noise_critic

    def _decode(self, batch: Batch, u: Tensor, following: bool = False) -> Tensor:
        assert self.decode is not None
        self.base_calls += 1
        return self.decode(batch, u, following)

    def log_ratio(self, features: Tensor, u: Tensor) -> Tensor:
        """``log pi(u_k | s) - log p(u_k)``, (B, K), of features (B, d) and ``u`` (B, K, dim).

        ``p`` is what the candidates were drawn from, N(0, initial_std) squashed; the squash cancels.
        """
        space, z = self.space, self.space.unsquash(u, 0.999)
        mean, log_std = (value.unsqueeze(1) for value in self.actor(features))
        exponent = (z / space.initial_std).square() - ((z - mean) * (-log_std).exp()).square()
        return 0.5 * exponent.sum(-1) + (math.log(space.initial_std) - log_std).sum(-1)

    @torch.no_grad()
    def td_target(self, batch: Batch) -> Tensor:
        """``R + D * min_e Qbar^A_e(s', a')``, (B,); clipped to the possible returns.

        ``a'`` is the chunk of ``u' ~ pi(s')`` (exact), or a stored candidate resampled in its place
        (importance); with ``bootstrap=noise_critic`` the value is ``min_e Qbar^W_e(s', u')``.
        """
        features = batch["next_features"]
        if self.importance:
            ratio = self.log_ratio(features, batch["next_candidates_u"])
            chosen = torch.multinomial(torch.softmax(ratio, 1), 1)
            value = self.target_critic(features, pick(batch["next_candidates"], chosen)[:, 0])
            log_prob = self.actor.log_prob(features, pick(batch["next_candidates_u"], chosen)[:, 0])
            return self.soft_bootstrap(batch, value.min(0).values, log_prob)
        following = self.actor.sample(features)
        if self.exact:
            chunk = self._decode(batch, following.u.unsqueeze(1), following=True)[:, 0]
            value = self.target_critic(features, chunk)
        else:
            value = self.target_noise_critic(features, following.u)
        return self.soft_bootstrap(batch, value.min(0).values, following.log_prob)

    def pairs(self, batch: Batch, count: int) -> tuple[Tensor, Tensor]:
        """``count`` noises of each state and their chunks, (B, count, dim) and (B, count, A).

        Stored ones without replacement, or fresh draws of the noise space, decoded.
        """
        size, device, space = len(batch["reward"]), batch["reward"].device, self.space
        if not self.exact:
            order = torch.rand(size, self.config.num_candidates, device=device).argsort(1)[:, :count]
            return pick(batch["candidates_u"], order), pick(batch["candidates"], order)
        u = space.squash(space.initial_std * torch.randn(size, count, space.dim, device=device))
        return u, self._decode(batch, u)

    def distillation_loss(self, batch: Batch, u: Tensor, chunks: Tensor) -> Tensor:
        """Of ``Q^W_e(s, u)`` from ``Q^A_e(s, a)``, member by member, on ``pairs``.

        Equation 4 of arXiv 2506.15799; its gradient reaches ``Q^W`` alone.
        """
        features = batch["features"].detach()
        with torch.no_grad():
            wanted = self.critic(features, chunks)
        return self.noise_critic.regress(features, u, wanted)[0]

    def actor_loss(self, batch: Batch) -> tuple[Tensor, ActorOutput]:
        """``E[alpha * KL(pi || prior) - min_e Q^W_e(s, u)]``, or with entropy as in ``SoftActorCritic``.

        Entropy alone pulls towards uniform noise within the bound, which is not what the base was trained
        on, and the more so the more noise there is. The divergence is taken before squashing, in closed form.
        """
        loss, drawn = super().actor_loss(batch)
        if self.config.regularizer == "prior":
            divergence = kl_to_prior(drawn.mean, drawn.log_std, self.space.initial_std)
            loss = loss + (self.alpha.detach() * (divergence - drawn.log_prob)).mean()
        if self.config.imitation_weight:
            loss = loss + self.imitation_loss(batch)
        return loss, drawn

    def phase(self) -> tuple[int, ...]:
        return *super().phase(), self._distillations()

    def _distillations(self) -> int:
        """Steps of the distillation in the coming update."""
        rate = self.config.distillation_steps
        return math.floor((self.updates + 1) * rate) - math.floor(self.updates * rate)

    def learn(self, batch: Batch) -> dict[str, Tensor]:
        calls = self.base_calls
        metrics = self._update_critic(batch, self.td_target(batch))
        for _ in range(self._distillations()):
            loss = self.distillation_loss(batch, *self.pairs(batch, self.config.distilled_pairs))
            self._step(self.noise_optimizer, loss)
            metrics["distillation_loss"] = loss.detach()
        metrics |= self._update_actor(batch)
        if self.every(RANKED_EVERY):
            metrics |= self.diagnose(batch)
        metrics["base_calls"] = torch.tensor(float(self.base_calls - calls))
        return metrics

    @torch.no_grad()
    def diagnose(self, batch: Batch) -> dict[str, Tensor]:
        """Rank correlation of the two critics; of importance weights, how many candidates they amount to."""
        if self.exact:
            batch = {name: value[:RANKED_STATES] for name, value in batch.items()}
        pairs = self.pairs(batch, RANKED) if self.exact else (batch["candidates_u"], batch["candidates"])
        ranks = rank_correlation(self.noise_critic, self.critic, batch["features"], *pairs)
        metrics = {"rank_correlation": ranks}
        if self.importance:
            weights = torch.softmax(self.log_ratio(batch["next_features"], batch["next_candidates_u"]), 1)
            metrics["effective_candidates"] = (1.0 / weights.square().sum(1)).mean()
        return metrics
