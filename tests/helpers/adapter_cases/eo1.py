"""EO-1 with two cameras, executing a part of its chunk; and all of it."""

from tests.helpers.adapter_cases import Case

CASES = [Case("eo1", inert=2 * 6), Case("eo1", fields={"n_action_steps": 6})]
