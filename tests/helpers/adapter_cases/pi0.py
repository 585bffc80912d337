"""pi0: one camera; one empty camera beside it; relative actions."""

from tests.helpers.adapter_cases import Case, with_argument

CASES = [
    Case("pi0", with_argument),
    Case("pi0", with_argument, {"empty_cameras": 1}),
    Case("pi0", with_argument, {"use_relative_actions": True}),
]
