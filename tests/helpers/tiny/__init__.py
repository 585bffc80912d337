"""Tiny random instances of every policy type: ``adapters/tiny`` has those of ``--tiny``, the rest is here."""

from tests.helpers.tiny.policies import BUILDERS
from trimtab.adapters.tiny import make_tiny

__all__ = ["TYPES", "make_tiny"]

TYPES = tuple(sorted(BUILDERS))  # policy types with a tiny instance
