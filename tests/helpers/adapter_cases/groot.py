"""GR00T N1.7: with the dataset's statistics; with the GR00T checkpoint's own, and two cameras."""

from tests.helpers.adapter_cases import Case

CASES = [Case("groot"), Case("groot", fields={"sidecars": True, "cameras": 2})]
