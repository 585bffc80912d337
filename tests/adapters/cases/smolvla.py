"""SmolVLA: one camera; and two of which one is empty."""

from tests.adapters.cases import Case, with_argument

CASES = [Case("smolvla", with_argument), Case("smolvla", with_argument, {"empty_cameras": 1})]
