"""How an algorithm acts while it learns, and what it deploys: the parts that do not learn.

The defaults are those of an algorithm that learns a noise actor and feeds the frozen policy one noise of it
per chunk. An algorithm that acts in another way overrides them; nothing outside this folder asks which it is.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.adapters import PolicyAdapter, PolicyConfig, UserError
from trimtab.policies.acting import Candidates, Choice, ChunkPolicy, Denoise, draw_candidates
from trimtab.policies.actor import NoiseActor
from trimtab.policies.artefact import save_artefact
from trimtab.policies.critic import CriticConfig, CriticEnsemble
from trimtab.policies.noise_samplers import NoiseSampler, prior_noise, steered_noise
from trimtab.policies.noise_space import NoiseSpace, NoiseSpaceConfig
from trimtab.policies.residual import ResidualActor


@dataclass(frozen=True)
class RunRequest:
    """What a run asks of its algorithm, beside learning: see ``AlgorithmConfig.check``."""

    tasks: int = 1
    processes: int = 1
    resume: bool = False
    warm_start: bool = False
    inverts: bool = True  # the policy tells the noise of a chunk
    attended: bool = False  # people start its episodes, which nothing repeats


PLAIN_RUN = RunRequest()


@dataclass(frozen=True)
class LoadedBase:
    """The frozen policy: the adapter, how it was named, and the folder or server it was loaded from."""

    adapter: PolicyAdapter
    options: PolicyConfig
    folder: Path | str


class TrainingResult:
    """What a run has learnt, as commands see it; ``actor`` is what was trained to act.

    ``deployed_candidates``: among so many chunks the deployed policy takes the best by ``selecting_critic``.
    """

    actor: Any
    deployed_candidates: int = 1

    def deployed_policy(self, deterministic: bool = True) -> ChunkPolicy:
        """What is deployed; ``deterministic`` takes the mean of what could be drawn."""
        return steered_noise(self.actor, deterministic)

    def policies(self) -> dict[str, ChunkPolicy]:
        """Policies to measure while it learns; ``actor`` is the one that is deployed."""
        return {"actor": self.deployed_policy()}

    def trained_parameters(self) -> dict[str, int]:
        """Weights that training made and each of ``policies`` needs."""
        return {"actor": count_parameters(self.actor)}

    def selecting_critic(self) -> tuple[CriticEnsemble, CriticConfig] | None:
        """A critic of chunks that an artefact keeps to choose among candidates, and its config."""
        return None

    def edit_actor(self) -> ResidualActor | None:
        """What changes the chunks of the chosen noise, if anything; an artefact keeps it."""
        return None

    def save(self, output: Path, base: LoadedBase, noise: NoiseSpaceConfig, training: dict[str, Any]) -> Path:
        """Write what is deployed into a folder under ``output`` and return it; ``training`` holds facts."""
        steered = base.adapter, base.options, base.folder
        acting = {"num_candidates": self.deployed_candidates}
        return save_artefact(
            output / "artefact",
            self.actor,
            noise,
            *steered,
            training,
            self.selecting_critic(),
            acting=acting,
            edit=self.edit_actor(),
        )


class BehaviorPolicy(TrainingResult):
    """How an algorithm acts while it learns.

    ``act`` needs so many ``draws`` of the prior for each observation. ``start`` (dim,) is where the actor's
    mean began, before squashing; ``None``: at 0.
    """

    actor: NoiseActor
    space: NoiseSpace
    draws: int = 1
    start: Tensor | None = None

    def propose(self, features: Tensor, prior: Tensor, denoise: Denoise, steering: bool) -> Candidates:
        """Candidates of each observation, which the replay keeps and the algorithm may choose from.

        Args:
            features: (B, d).
            prior: (B, config.candidates, *noise_shape) fresh draws.
            denoise: the frozen policy.
            steering: whether what has been learnt takes part; else all are an untrained actor's.
        """
        return draw_candidates(self.space, prior, denoise)

    def act(
        self, features: Tensor, prior: Tensor, denoise: Denoise, candidates: Candidates, steered: Tensor
    ) -> Choice:
        """What is executed while learning, or a UserError where the actor has diverged.

        Args:
            features, denoise: as for ``propose``.
            prior: (B, draws, *noise_shape) fresh draws.
            candidates: from ``propose``; ``None`` where ``config.candidates`` asks for none.
            steered: (B,) bool: where what is learnt acts; the untrained policy acts elsewhere.
        """
        draw = prior[:, 0]
        u = prior_noise(self.space, self.start).choose(features, draw)
        if steered.any():
            chosen = steered_noise(self.actor).choose(features, draw)
            u = torch.where(steered.to(u.device).unsqueeze(1), chosen, u)
        if not torch.isfinite(u).all():
            raise UserError("--rl.learning_rate", "the noise actor has diverged to NaN or Inf; lower it")
        return NoiseSampler(lambda *_: u, self.space).act(features, prior, denoise)


def count_parameters(*modules: nn.Module) -> int:
    """How many weights the modules have."""
    return sum(parameter.numel() for module in modules for parameter in module.parameters())
