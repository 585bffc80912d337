"""`trimtab hello`: a throw-away command that shows what a new one costs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class HelloConfig:
    """``trimtab hello``."""

    # Whom to greet.
    name: str = "world"


def main(config: HelloConfig) -> None:
    print(f"hello {config.name}")
