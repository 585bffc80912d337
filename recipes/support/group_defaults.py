"""What a config says by default of a group of options that a user names in part."""

import dataclasses
import types
import typing
from typing import Any

import draccus

from trimtab.recipes.support.option_dicts import Options, merge


def members(hint: Any) -> tuple[Any, ...]:
    """The types that a union names; of another hint itself."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def is_choices(cls: Any) -> bool:
    """Whether a class stands for those that are registered with it."""
    return isinstance(cls, type) and draccus.ChoiceRegistry in cls.__bases__


def with_defaults(cls: Any, values: Options) -> Options:
    """``values`` for the config ``cls``, and of each group in them what ``cls`` says of it by default.

    draccus fills a group that is named in part with the group's own defaults, which ``cls`` may have changed:
    after ``--rl.critic.hidden=64`` two critics would be left of best_of_n's five.
    """
    if is_choices(cls):
        cls = cls.get_known_choices().get(values.get("type"))
    if not dataclasses.is_dataclass(cls):
        return values
    found, hints = dict(values), typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        value, kinds = found.get(field.name), members(hints[field.name])
        parts = [kind for kind in kinds if dataclasses.is_dataclass(kind) or is_choices(kind)]
        if not isinstance(value, dict) or len(parts) != 1:
            continue
        value = with_defaults(parts[0], value)
        if field.default_factory is not dataclasses.MISSING:
            default: Any = field.default_factory()
            own, plain = draccus.encode(default, parts[0]), _without_changes(default, parts[0])
            if not is_choices(parts[0]) or value.get("type") == own["type"]:
                value = merge(_changed(own, plain), value)
        found[field.name] = value
    return found


def _without_changes(default: Any, kind: Any) -> Options:
    """What a group of the class of ``default`` is by itself; nothing where it is not without arguments."""
    try:
        return draccus.encode(type(default)(), kind)
    except TypeError:
        return {}


def _changed(own: Options, plain: Options) -> Options:
    """What is otherwise in ``own``."""
    found: Options = {}
    for name, value in own.items():
        if name in plain and value == plain[name]:
            continue
        both = isinstance(value, dict) and isinstance(plain.get(name), dict)
        found[name] = _changed(value, plain[name]) if both else value
    return found
