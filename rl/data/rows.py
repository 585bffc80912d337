"""What the replay keeps of an observation, row by row."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from trimtab.policies.acting import Candidates
from trimtab.rl.data.decoder import ConditioningSpec
from trimtab.rl.runner import Encoded

# Features (d,) of an observation, and what else is kept of it by name.
Row = tuple[np.ndarray, dict[str, np.ndarray]]


def observation_rows(
    features: Tensor, candidates: Candidates | None, conditioning: Encoded, spec: ConditioningSpec | None
) -> list[Row]:
    """The rows of B observations.

    Args:
        features: (B, d).
        candidates: kept as ``candidates`` (K, steps * action_dim) and ``candidates_u`` (K, dim), if any.
        conditioning: kept where ``spec`` says how.
        spec: of the conditioning.
    """
    kept: list[dict[str, np.ndarray]] = [{} for _ in features]
    if candidates is not None:
        chunks, u = candidates.chunks.flatten(2).cpu().numpy(), candidates.u.float().cpu().numpy()
        kept = [{"candidates": chunks[i], "candidates_u": u[i]} for i in range(len(kept))]
    if spec is not None:
        for i, row in enumerate(kept):
            row |= spec.row(conditioning, i)  # type: ignore[arg-type]
    return list(zip(features.cpu().numpy(), kept, strict=True))
