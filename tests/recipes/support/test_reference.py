"""The configuration reference is what the dataclasses say."""

from dataclasses import dataclass, field
from pathlib import Path

from tests.helpers.reference import comments, described, reference, rows

PAGE = Path(__file__).parents[3] / "recipes" / "CONFIGURATION.md"


@dataclass
class Parent:
    """A config."""

    # One line.
    first: int = 1
    second: float = 2.0
    # What the comment says,
    # over two lines.
    third: str | None = None


@dataclass
class Child(Parent):
    """Another one."""

    first: int = 3
    # A comment.
    fourth: list[int] = field(default_factory=list)
    fifth: bool = True


def test_comments_become_descriptions():
    own = comments(Parent)
    assert own["first"] == "One line." and "second" not in own
    assert own["third"] == "What the comment says, over two lines."
    assert described(Child)["first"] == own["first"] and comments(Child) == {"fourth": "A comment."}
    assert rows(Child)[2:] == [
        "| `first` | int | `3` | One line. |",
        "| `second` | float | `2.0` |  |",
        "| `third` | str or none | `none` | What the comment says, over two lines. |",
        "| `fourth` | list[int] | `[]` | A comment. |",
        "| `fifth` | bool | `true` |  |",
    ]


def test_the_committed_page_is_up_to_date():
    made = reference()
    assert PAGE.read_text(encoding="utf-8") == made, (
        "options have changed: python -m tests.helpers.reference > recipes/CONFIGURATION.md"
    )
    for option in ("`env_steps`", "#### AlgorithmConfig: residual", "Largest correction of an entry"):
        assert option in made
