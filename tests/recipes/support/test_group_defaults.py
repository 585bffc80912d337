"""A group that is named in part keeps what the config around it says of the rest."""

from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import get_type_hints

import draccus
import pytest

from trimtab.recipes.cli import COMMANDS, config_class
from trimtab.recipes.cli.adapt import AdaptConfig
from trimtab.recipes.cli.demo import DemoConfig
from trimtab.recipes.compare.methods import make_method
from trimtab.recipes.support.group_defaults import members, with_defaults
from trimtab.recipes.support.options import parse
from trimtab.rl.algorithms import BestOfNConfig

METAWORLD = "--config_path=metaworld"


def test_a_size_of_the_critics_leaves_as_many_as_there_were():
    plain, wide = (
        parse(AdaptConfig, "adapt", [METAWORLD, *more]) for more in ([], ["--rl.critic.hidden=64"])
    )
    assert plain.rl.critic == BestOfNConfig().critic and wide.rl.critic.hidden == 64
    assert wide.rl.critic.members == plain.rl.critic.members == 5
    other = parse(AdaptConfig, "adapt", [METAWORLD, "--rl.type=dsrl_na", "--rl.critic.hidden=64"])
    assert other.rl.critic.members == 2, "another algorithm's own"
    method = make_method("best_of_n", {"rl": {"critic": {"hidden": 64}}})
    assert method.rl.critic == wide.rl.critic


def test_an_option_of_the_demo_leaves_the_others():
    plain = parse(DemoConfig, "demo", [])
    changed = parse(DemoConfig, "demo", ["--eval.videos=0", "--base.seed=3", "--train.log_every=100"])
    assert (changed.eval.videos, changed.base.seed, changed.train.log_every) == (0, 3, 100)
    changed.eval.videos, changed.base.seed, changed.train.log_every = (
        plain.eval.videos,
        plain.base.seed,
        plain.train.log_every,
    )
    assert changed == plain


@dataclass
class Place:
    x: float
    y: float = 0.0


@dataclass
class Somewhere:
    place: Place = field(default_factory=lambda: Place(1.0, 2.0))


def test_a_group_that_needs_arguments_keeps_what_is_said_of_it():
    for given, place in (({"y": 3.0}, Place(1.0, 3.0)), ({"x": 0.0}, Place(0.0, 2.0))):
        found = draccus.decode(Somewhere, with_defaults(Somewhere, {"place": given}))
        assert found.place == place


@pytest.mark.parametrize("command", [name for name, one in COMMANDS.items() if not one.light])
def test_any_option_of_any_group_leaves_the_group_as_it_is(command):
    """Named with the value that it has by default."""
    cls, named = config_class(command), 0
    for group in fields(cls):
        default = group.default_factory() if group.default_factory is not MISSING else None
        if not is_dataclass(default):
            continue
        part = next(kind for kind in members(get_type_hints(cls)[group.name]) if kind is not type(None))
        own = draccus.encode(default, part)
        for name in own.keys() - {"type"}:
            one = {key: value for key, value in own.items() if key in (name, "type")}
            found = draccus.decode(part, with_defaults(cls, {group.name: one})[group.name])
            assert found == default, f"--{group.name}.{name}"
            named += 1
    assert named or command in ("recipes", "policies", "station")
