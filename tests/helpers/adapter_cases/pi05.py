"""pi05: one camera; one empty camera beside it."""

from tests.helpers.adapter_cases import Case, with_argument

CASES = [Case("pi05", with_argument), Case("pi05", with_argument, {"empty_cameras": 1})]
