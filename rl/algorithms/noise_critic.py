"""The noise critic: what of DSRL-NA's distillation several algorithms share (arXiv 2506.15799, equation 4).

An action critic ``Q^A(s, a)`` judges chunks; a noise critic ``Q^W(s, u)`` is regressed onto its values, on
pairs of a noise and the chunk that the frozen policy makes of it; the noise actor climbs the noise critic.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.adapters import UserError
from trimtab.policies.critic import CriticEnsemble
from trimtab.policies.noise_space import NoiseSpace


def check_pairs(space: NoiseSpace, name: str) -> None:
    """Raise a UserError where ``u`` does not tell the noise, so that a chunk is not its doing alone."""
    if not space.determines_noise:
        raise UserError(
            "--noise.type",
            f"{name} distils which noise made which chunk, which this space cannot express; use full, "
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
