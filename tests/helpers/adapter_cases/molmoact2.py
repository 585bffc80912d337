"""MolmoAct2: padded action dimensions masked, as released, or not; two cameras."""

from tests.helpers.adapter_cases import Case
from trimtab.adapters.tiny.parts import ACTION_DIM

INERT = 8 * (32 - ACTION_DIM)

CASES = [
    Case("molmoact2", inert=INERT),
    Case("molmoact2", fields={"model": {"mask_action_dim_padding": False}}),
    Case("molmoact2", fields={"cameras": 2, "action_mode": "continuous"}, inert=INERT),
]
