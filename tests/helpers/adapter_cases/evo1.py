"""Evo-1: all tokens or one pooled token, an empty camera, several embodiments."""

import torch

from tests.helpers.adapter_cases import Case, with_injection


def public(adapter, batch, noise):
    """LeRobot draws from (0, 1) and stretches that to the (-1, 1) of ``noise``."""
    return with_injection(adapter, batch, (noise + 1) / 2, (torch.rand,))


INERT = 8 * (6 - 3)  # of 6 dimensions, 3 are padded, at each of 8 steps

CASES = [
    Case("evo1", public, inert=INERT),
    Case("evo1", public, {"return_cls_only": True}, inert=INERT),
    Case("evo1", public, {"empty_cameras": 1, "num_categories": 2}, inert=INERT),
]
