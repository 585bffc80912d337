"""No config.json ends in a traceback, and none in other actions than LeRobot's own.

``TRIMTAB_FUZZ=all`` tries every field with every value, instead of a sample.
"""

import os
import random
from collections import Counter

import pytest

from tests.helpers.adapter_cases import all_cases
from tests.helpers.fuzz import Fuzz, inputs, limited_memory
from tests.helpers.tiny import make_tiny

ALL = os.environ.get("TRIMTAB_FUZZ") == "all"
SAMPLE = 6  # of each type
PROCESSOR_SAMPLE = 24
FIRST = list({case.type: case for case in reversed(all_cases())}.values())[::-1]
SMALL = [case for case in FIRST if case.type == "multi_task_dit"]  # with a camera, and soon loaded


@pytest.fixture(autouse=True)
def bounded():
    with limited_memory():
        yield


@pytest.mark.parametrize("case", FIRST, ids=lambda case: case.type)
def test_config_fuzz(case, tmp_path):
    fuzz = Fuzz(case, make_tiny(case.type, tmp_path / "policy", **case.fields))
    tried = inputs(fuzz.config)
    if not ALL:
        tried = random.Random(f"{case.type} 0").sample(tried, SAMPLE)
    judge(case, [fuzz.outcome(*entry) for entry in tried])


@pytest.mark.parametrize("case", FIRST if ALL else SMALL, ids=lambda case: case.type)
def test_processor_fuzz(case, tmp_path):
    fuzz = Fuzz(case, make_tiny(case.type, tmp_path / "policy", **case.fields))
    tried = list(fuzz.processor_inputs())
    if not ALL:
        tried = random.Random(f"{case.type} 0").sample(tried, PROCESSOR_SAMPLE)
    judge(case, [fuzz.outcome_of(*entry) for entry in tried])


def judge(case, outcomes):
    counts = Counter(outcome.kind for outcome in outcomes)
    print(f"{case.type}: {len(outcomes)} inputs, {dict(counts)}")
    wrong = [str(outcome) for outcome in outcomes if outcome.kind in ("traceback", "difference")]
    assert not wrong, "\n".join(wrong)
    assert counts["refused"] + counts["refused here"]
