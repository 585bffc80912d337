"""SmolVLA: one camera; two of which one is empty; in bfloat16, as LeRobot runs published ones."""

from tests.helpers.adapter_cases import Case, with_argument

CASES = [
    Case("smolvla", with_argument),
    Case("smolvla", with_argument, {"empty_cameras": 1}),
    Case("smolvla", with_argument, {"load_vlm_weights": True}),
]
