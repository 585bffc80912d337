"""Settings that go with an algorithm: those of the paper, and what it implies."""

from pathlib import Path
from typing import Any

import yaml

PAPER: dict[str, dict[str, Any]] = yaml.safe_load(
    Path(__file__).with_name("paper.yaml").read_text(encoding="utf-8")
)

# What goes with an algorithm unless it is said otherwise: a golden ticket is one noise for all observations.
IMPLIED_DEFAULTS: dict[str, dict[str, Any]] = {"golden_ticket": {"noise": {"type": "constant"}}}
# What an algorithm spends in the place of --train.env_steps.
BUDGETS = {"golden_ticket": "episodes: --rl.budget"}
