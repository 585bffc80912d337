"""Figures that tell whether a critic can be trusted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from trimtab.rl.algorithms.base import Algorithm
from trimtab.rl.collector import Episode


def returns_to_go(episode: Episode, tail: float) -> np.ndarray:
    """Discounted return from each chunk of a finished episode, (chunks,).

    Args:
        episode: a finished episode.
        tail: value of what follows the last chunk, used where the episode did not terminate.
    """
    returns = np.zeros(len(episode.rewards))
    following = tail
    for index in reversed(range(len(returns))):
        following = episode.rewards[index] + episode.discounts[index] * following
        returns[index] = following
    return returns


@torch.no_grad()
def calibration(algorithm: Algorithm, episodes: Sequence[Episode]) -> dict[str, float]:
    """How the critic's values compare with the returns that followed.

    Values are those of the present critic for what recent episodes did. An episode cut off by the time
    limit is continued with the critic's own value of its last chunk, so it says little about the bias.

    Returns:
        ``calibration_bias`` (mean of value - return), ``calibration_rmse`` and ``calibration_correlation``
        (Pearson); empty where there is nothing to compare.
    """
    values, returns = [], []
    for episode in episodes:
        device = next(algorithm.parameters()).device
        seen = (episode.features, episode.u, episode.chunks)
        value = algorithm.value(*(torch.as_tensor(array).to(device) for array in seen)).cpu().numpy()
        values.append(value)
        returns.append(returns_to_go(episode, float(value[-1])))
    if not values:
        return {}
    value, target = np.concatenate(values), np.concatenate(returns)
    error = value - target
    out = {
        "calibration_bias": float(error.mean()),
        "calibration_rmse": float(np.sqrt(np.square(error).mean())),
    }
    if value.std() > 0 and target.std() > 0:
        out["calibration_correlation"] = float(np.corrcoef(value, target)[0, 1])
    return out
