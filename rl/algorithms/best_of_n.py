"""Best-of-N: an action critic picks among candidate chunks of the frozen policy, and is distilled into noise.

The action critic learns by TD over the stored (noise, chunk) pairs of each observation, as in EMaQ
(Ghasemipour et al., arXiv 2007.11091) and the best-of-N of Q-chunking (Li et al., arXiv 2507.07969). A noise
critic is regressed onto the action critic on those pairs (DSRL-NA, arXiv 2506.15799, equation 4), and the
noise actor climbs it, held near the prior. What is deployed takes the best of the actor's chunk and a few of
the base's. See ``best_of_n.md``.

With edits (``--rl.edit.scale``) a small actor learns a bounded change of each chunk, as in EXPO (Dong et al.,
arXiv 2507.07986), and every candidate is judged as it is and edited.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from trimtab.adapters import UserError
from trimtab.adapters.errors import at_least
from trimtab.policies.acting import (
    BestOfCandidates,
    Candidates,
    Choice,
    ChunkPolicy,
    Denoise,
    by_critic,
    draw_candidates,
)
from trimtab.policies.actor import ActorConfig, NoiseActor, kl_to_prior
from trimtab.policies.critic import LOSSES, CriticConfig, CriticEnsemble
from trimtab.policies.noise_samplers import steered_policy
from trimtab.policies.noise_space import NoiseSpace
from trimtab.policies.residual import EditConfig, ResidualActor, edits_of
from trimtab.rl.algorithms.acting import PLAIN_RUN, RunRequest, count_parameters
from trimtab.rl.algorithms.base import RANKED_EVERY, Algorithm, AlgorithmConfig, Problem, frozen
from trimtab.rl.algorithms.dsrl_na import check_pairs, pick, rank_correlation
from trimtab.rl.data.replay import Batch

TARGETS = ("max", "sarsa", "softmax")
DISTILLATION = ("critic", "regression")
ACTING = ("argmax", "softmax", "thompson")


@AlgorithmConfig.register_subclass("best_of_n")
@dataclass
class BestOfNConfig(AlgorithmConfig):
    """Settings of best-of-N."""

    actor: ActorConfig = field(default_factory=ActorConfig)
    # The action critic, and the noise critic that is distilled from it. More members choose better from
    # few transitions: see rl/algorithms/best_of_n.md.
    critic: CriticConfig = field(default_factory=lambda: CriticConfig(members=5))
    # Members of the action critic, drawn anew at each update, of whose values the smallest counts in the
    # target; at most all of them.
    target_members: int = 2
    # Loss of both. logistic: cross-entropy of the value, scaled to [0, 1] between the smallest and largest
    # possible return (squared, if it has none); squared: squared error of the value.
    critic_loss: str = "logistic"
    # Share of the learning rate that is left at the end of --train.env_steps; it falls linearly.
    learning_rate_end: float = 0.1
    # Chunks in an n-step return. Many make the acting policy good sooner: see rl/algorithms/best_of_n.md.
    n_step: int = 10
    # Candidates decoded for each observation, of which the acting policy takes one.
    num_candidates: int = 16
    # How many of them the actor proposes; the others are draws of the base's own noise. Default: half.
    actor_candidates: int | None = None
    # Stored candidates of the next state among which the TD target looks. Default: half.
    target_candidates: int | None = None
    # max: the best of them; sarsa: any one (the value of the base policy); softmax: weighted by value.
    target: str = "max"
    # argmax of the mean critic, softmax of it, or argmax of one member drawn for each observation.
    acting: str = "argmax"
    # Candidates among which the artefact takes the best by the critic: the actor's, at its mean, and draws of
    # the base's own noise. 1: the actor alone, which asks the base once per chunk.
    deployed_candidates: int = 4
    # Temperature of softmax targets and softmax acting, in units of return.
    temperature: float = 0.3
    # Members of the noise critic: it follows the action critic, whose mean is what several are for.
    noise_members: int = 3
    # Stored pairs of each sampled state on which the noise critic is regressed. Default: a quarter of them.
    distilled_pairs: int | None = None
    # How the actor is distilled: climb the noise critic, or regress onto the noises of good candidates.
    distillation: str = "critic"
    # Temperature of the weights of that regression, in units of return.
    regression_temperature: float = 0.3
    # Weight of KL(actor || prior) against the noise critic's value, in units of return per nat.
    prior_weight: float = 0.25
    # Share of the states in which the actor is trained at its mean (which is deployed), and not at a draw.
    mean_share: float = 0.5
    # Weight of -log pi of the noises that would have made a person's chunks (--teleop.type), in units of
    # return per nat; 0: off. Few chunks have such a noise: see recipes/configs/your_robot/README.md.
    imitation_weight: float = 0.0
    # What is learnt to change in a chunk that no noise makes good; off.
    edit: EditConfig = field(default_factory=EditConfig)

    pace: ClassVar[dict[str, Any]] = AlgorithmConfig.pace | {"warmup_transitions": 0, "first_update": 64}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("num_candidates", "target_members", "temperature", "deployed_candidates")
        self.require_positive("prior_weight", "regression_temperature", "noise_members")
        if not 0 <= self.proposed < self.num_candidates:
            raise UserError(
                "--rl.actor_candidates",
                f"must be from 0 to below num_candidates={self.num_candidates}, got {self.proposed}",
            )
        for name, count in (("target_candidates", self.targets), ("distilled_pairs", self.pairs)):
            if not 1 <= count <= self.num_candidates:
                raise UserError(f"--rl.{name}", f"must be from 1 to num_candidates={self.num_candidates}")
        self.require_known(target=TARGETS, distillation=DISTILLATION, acting=ACTING, critic_loss=LOSSES)
        at_least(0, self, "--rl.", "imitation_weight")
        if not 0.0 <= self.mean_share <= 1.0:
            raise UserError("--rl.mean_share", f"is a share, from 0 to 1, got {self.mean_share}")

    @property
    def candidates(self) -> int:
        return self.num_candidates

    @property
    def replayed(self) -> tuple[str, ...]:
        return *super().replayed, *(("imitated",) if self.imitation_weight else ())

    @property
    def proposed(self) -> int:
        """Candidates that the actor proposes, once it has begun to learn."""
        # Half of a single candidate is none.
        return self.num_candidates // 2 if self.actor_candidates is None else self.actor_candidates

    @property
    def targets(self) -> int:
        """Candidates in a TD target."""
        return max(self.num_candidates // 2, 1) if self.target_candidates is None else self.target_candidates

    @property
    def pairs(self) -> int:
        """Pairs of a state in the distillation."""
        return max(self.num_candidates // 4, 1) if self.distilled_pairs is None else self.distilled_pairs

    def check(self, space: NoiseSpace, run: RunRequest = PLAIN_RUN) -> None:
        check_pairs(self, space, run)

    def build(self, problem: Problem) -> BestOfN:
        return BestOfN(self, problem)


class BestOfN(Algorithm):
    """See the module's docstring."""

    config: BestOfNConfig
    draws = 0  # it acts by its candidates

    def __init__(self, config: BestOfNConfig, problem: Problem) -> None:
        super().__init__(config, problem)
        space = problem.space
        within = problem.bounds if config.critic_loss == "logistic" else None  # what the critics cannot leave
        self.bounds = problem.bounds if config.clip_targets else within
        self.deployed_candidates = config.deployed_candidates
        self.actor = NoiseActor(problem.feature_dim, space, config.actor, problem.observe)
        feature_dim = self.actor.encoder.dim
        self.critic = CriticEnsemble(feature_dim, problem.chunk_size, config.critic, within)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        members = replace(config.critic, members=config.noise_members)
        self.noise_critic = CriticEnsemble(feature_dim, space.dim, members, within)
        self.critic_optimizer = self._adam(self.critic, self.noise_critic, self.actor.encoder)
        self.actor_optimizer = self._adam(self.actor.net)
        self.edit: ResidualActor | None = None
        if config.edit.scale:  # built last: whatever it draws, the others begin as they do without it
            self.edit = ResidualActor(feature_dim, problem.chunk_size, config.edit.scale, config.actor)
            self.edit_optimizer = self._adam(self.edit)

    def edited(self, features: Tensor, chunks: Tensor) -> Tensor:
        """Stored ``chunks`` (B, m, A) as the edit actor changes them at encoded observations (B, d)."""
        return chunks if self.edit is None else chunks + self.edit(features, chunks)

    @torch.no_grad()
    def td_target(self, batch: Batch, index: Tensor) -> Tensor:
        """``R + D * V(s')``, (B,), clipped to the possible returns.

        ``V`` is over those of ``next_candidates`` (B, K, A) that ``index`` (B, m) names, and with edits over
        each of them edited, too (``sarsa``: unedited). That is the value of EXPO's on-the-fly policy, which
        takes the best of the base's proposals and their edits, but that the proposals are stored ones, not
        drawn anew, and edits here are without noise.
        """
        features, chunks = batch["next_features"], pick(batch["next_candidates"], index)
        if self.edit is not None:
            chunks = torch.cat([chunks, self.edited(features, chunks)], 1)
        values = self.target_critic.smallest(features, chunks, self.config.target_members)
        if self.config.target == "max":
            value = values.max(1).values
        elif self.config.target == "sarsa":
            value = values[:, 0]
        else:
            value = (torch.softmax(values / self.config.temperature, 1) * values).sum(1)
        return self.bootstrap(batch, value)

    def distillation_loss(self, batch: Batch, index: Tensor) -> Tensor:
        """Of ``Q^W_e(s, u_k)`` from ``mean Q^A(s, a_k)`` on the stored pairs that ``index`` (B, m) names.

        Equation 4 of arXiv 2506.15799; its gradient reaches ``Q^W`` alone. With edits a noise is worth what
        is deployed for it: ``mean Q^A(s, a_k + delta(s, a_k))``.
        """
        features = batch["features"].detach()
        with torch.no_grad():
            chunks = self.edited(features, pick(batch["candidates"], index))
            wanted = self.critic(features, chunks).mean(0)
        return self.noise_critic.regress(features, pick(batch["candidates_u"], index), wanted)[0]

    def actor_loss(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """``E[weight * KL(pi || N(0, I)) - mean Q^W(s, u)]``; and the KL (B,) and ``u``.

        The divergence is taken before squashing, where it has a closed form. It is strong where the mean
        runs away, so that the bound is not where the actor ends. ``u`` is the actor's mean in a share of the
        rows, spread over the batch, and a draw in the others: the deviation stays near the prior's, and what
        is good on average so far around is not yet what is best in the middle.
        """
        features = batch["features"].detach()
        eps = torch.randn(len(features), self.space.dim, dtype=features.dtype, device=features.device)
        row = torch.arange(len(features) + 1, device=features.device)
        at_mean = (row * self.config.mean_share).floor().diff() > 0
        drawn = self.actor.sample(features, eps.masked_fill(at_mean.unsqueeze(1), 0.0))
        with frozen(self.noise_critic):
            value = self.noise_critic(features, drawn.u).mean(0)
        divergence = kl_to_prior(drawn.mean, drawn.log_std, self.space.initial_std)
        return (self.config.prior_weight * divergence - value).mean(), divergence, drawn.u

    def regression_loss(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """``-E[sum_k w_k log N(z_k; pi(s))]``, ``w = softmax(mean Q^A(s, a_k) / temperature)``; KL and ``u``.

        ``z`` is ``u`` before squashing. Advantage-weighted regression (Peng et al., arXiv 1910.00177) over
        the stored pairs of a state: it needs no noise critic, and what does not matter stays at the prior.
        """
        with torch.no_grad():
            chunks = self.edited(batch["features"], batch["candidates"])
            values = self.critic(batch["features"], chunks).mean(0)
            weights = torch.softmax(values / self.config.regression_temperature, 1)
            z = self.space.unsquash(batch["candidates_u"], 0.999)
        mean, log_std = self.actor(batch["features"].detach())
        error = (z - mean.unsqueeze(1)) * (-log_std).exp().unsqueeze(1)
        loss = (0.5 * error.square() + log_std.unsqueeze(1)).sum(-1)
        divergence = kl_to_prior(mean, log_std, self.space.initial_std)
        return (weights * loss).sum(1).mean(), divergence, self.space.squash(mean)

    def edit_loss(self, batch: Batch, index: Tensor) -> tuple[Tensor, Tensor]:
        """``E[penalty / 2 * |delta / scale|^2 - mean Q^A(s, a_k + delta)]`` with ``delta(s, a_k)``; and it.

        On the stored pairs that ``index`` (B, m) names. Its gradient reaches the edit actor alone.
        """
        features, chunks = batch["features"].detach(), pick(batch["candidates"], index)
        change = self.edited(features, chunks) - chunks
        with frozen(self.critic):
            value = self.critic(features, chunks + change).mean(0)
        cost = 0.5 * (change / self.config.edit.scale).square().sum(-1)
        return (self.config.edit.penalty * cost - value).mean(), change.detach()

    def learn(self, batch: Batch) -> dict[str, Tensor]:
        reward = batch["reward"]
        order = torch.rand(len(reward), self.config.num_candidates, device=reward.device).argsort(1)
        target = self.td_target(batch, order[:, : self.config.targets])
        loss, values = self.critic_loss(batch, target)
        pairs = order[:, -self.config.pairs :]
        # In half of the states: it would take as long as all the rest, and the noise critic only follows.
        half = {name: batch[name][::2] for name in ("features", "candidates", "candidates_u")}
        distillation = self.distillation_loss(half, pairs[::2])
        self._step(self.critic_optimizer, loss + distillation)
        metrics = {
            "critic_loss": loss.detach(),
            "distillation_loss": distillation.detach(),
            **self.q_statistics(values),
        }
        if self.every(self.config.actor_every):
            regress = self.config.distillation == "regression"
            loss, divergence, u = (self.regression_loss if regress else self.actor_loss)(batch)
            if self.config.imitation_weight:
                loss = loss + self.imitation_loss(batch)
            self._step(self.actor_optimizer, loss)
            metrics |= {
                "actor_loss": loss.detach(),
                "noise_kl_to_prior": divergence.detach().mean(),
                "noise_rms": self.space.scale * u.detach().square().mean().sqrt(),
            }
            if self.edit is not None:
                loss, change = self.edit_loss(batch, pairs)
                self._step(self.edit_optimizer, loss)
                metrics |= {"edit_loss": loss.detach(), "edit_rms": change.square().mean().sqrt()}
        if self.every(RANKED_EVERY):
            features = batch["features"].detach()
            seen = features, batch["candidates_u"], self.edited(features, batch["candidates"])
            metrics["rank_correlation"] = rank_correlation(self.noise_critic, self.critic, *seen)
        return metrics

    def propose(self, features: Tensor, prior: Tensor, denoise: Denoise, steering: bool) -> Candidates:
        proposed = self.config.proposed if steering else 0
        return draw_candidates(self.space, prior, denoise, features, self.actor, proposed)

    def act(
        self, features: Tensor, prior: Tensor, denoise: Denoise, candidates: Candidates, steered: Tensor
    ) -> Choice:
        index = torch.zeros(len(features), dtype=torch.long)  # a draw from the prior like any other
        if steered.any():
            noise = self.config.edit.exploration * self.config.edit.scale
            candidates = candidates.with_edits(features, edits_of(self.actor, self.edit, noise))
            index = torch.where(steered, self.select(features, candidates.chunks).cpu(), index)
        return candidates.take(index)

    def policies(self) -> dict[str, ChunkPolicy]:
        count, proposed = self.config.num_candidates, self.config.proposed
        edit = edits_of(self.actor, self.edit)
        acting = BestOfCandidates(self.space, count, self.select, self.actor, proposed, edit=edit)
        return {**super().policies(), "acting": acting}

    def trained_parameters(self) -> dict[str, int]:
        edit = [self.edit] if self.edit is not None else []
        parts = [self.critic, self.actor] if self.config.proposed else [self.critic]
        deployed = [self.actor, self.critic] if self.deployed_candidates > 1 else [self.actor]
        return {"actor": count_parameters(*deployed, *edit), "acting": count_parameters(*parts, *edit)}

    def deployed_policy(self, deterministic: bool = True) -> ChunkPolicy:
        return steered_policy(self.actor, self.critic, deterministic, self.deployed_candidates, self.edit)

    def selecting_critic(self) -> tuple[CriticEnsemble, CriticConfig]:
        return self.critic, self.config.critic

    def edit_actor(self) -> ResidualActor | None:
        return self.edit

    @torch.no_grad()
    def select(self, features: Tensor, chunks: Tensor) -> Tensor:
        """Which candidate acts: (B, d), (B, K, steps, action_dim) -> (B,)."""
        if self.config.acting == "argmax":
            return by_critic(self.actor, self.critic)(features, chunks)
        values = self.critic(self.actor.encode(features), chunks.flatten(2).to(self.accelerator.device))
        if self.config.acting == "thompson":
            member = torch.randint(len(values), (values.shape[1],), device=values.device)
            return values[member, torch.arange(values.shape[1], device=values.device)].argmax(1)
        return torch.multinomial(torch.softmax(values.mean(0) / self.config.temperature, 1), 1).squeeze(1)
