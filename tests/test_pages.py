"""The pages: their lines fit, their links and paths lead somewhere, their commands exist."""

import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

from trimtab.recipes.cli import COMMANDS

ROOT = Path(__file__).parents[1]
WIDTH = 100  # columns; tables may be wider
README_WORDS = 700
COMPARISONS = (f"recipes/configs/{name}/comparison/compare.md" for name in ("metaworld", "metaworld_suite"))
GENERATED = {"recipes/CONFIGURATION.md", *COMPARISONS}
TOP = ("adapters", "policies", "rl", "recipes", "tests", "notebooks", ".github")
# Other files that a page names are often what a command writes.
SOURCES = ("py", "yaml", "ipynb", "toml", "lock")
EXAMPLE = re.compile("NAME|TYPE|^recipe.yaml$")


def pages():
    """Every Markdown file that git knows or would add."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
    try:
        found = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):  # an unpacked archive
        found = [str(path.relative_to(ROOT)) for path in ROOT.rglob("*.md") if ".venv" not in path.parts]
    return sorted(name for name in set(found) if (ROOT / name).is_file())


PAGES = pages()


def without_code(text):
    return re.sub(r"^( *)```.*?^\1```", "", text, flags=re.S | re.M)


@cache
def anchors(path):
    """The anchors of a page's headings, as GitHub names them."""
    found = set()
    for heading in re.findall(r"^#+ +(.*)$", without_code(path.read_text()), re.M):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        name = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        count = 0
        while name + (f"-{count}" if count else "") in found:
            count += 1
        found.add(name + (f"-{count}" if count else ""))
    return found


def too_wide(text):
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("|")]
    return [line for line in lines if len(re.sub(r"<https?://[^>]*>", "", line)) > WIDTH]


def dead_links(page, text):
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(text)):
        if re.match(r"https?://|mailto:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    return dead


def missing_paths(page, text):
    """Paths of this repository that stand as code and are not there."""
    missing = []
    for name in re.findall(r"`([\w.\-]+(?:/[\w.\-]+)*/?)`", text):
        first, slash, _ = name.partition("/")
        inside = slash and first in TOP
        if not inside and name.rpartition(".")[2] not in SOURCES:
            continue
        if EXAMPLE.search(name) or (ROOT / name).exists() or (page.parent / name).exists():
            continue
        if slash:
            there = not inside and not (page.parent / first).exists()  # in another repository
        else:
            there = any(ROOT.glob(f"[!.]*/**/{name}"))
        if not there:
            missing.append(name)
    return missing


def unknown_commands(text):
    """What follows `trimtab` in commands and in code, where no command has that name."""
    said = re.findall(r"(?:^|`|&& |\$ )\s*trimtab +([a-z]\w*)", text, re.M)
    return [name for name in said if name not in COMMANDS]


@pytest.mark.parametrize("name", PAGES)
def test_every_link_path_and_command_of_a_page_exists(name):
    page = ROOT / name
    text = page.read_text()
    assert not dead_links(page, text)
    assert not missing_paths(page, text)
    assert not unknown_commands(text)


@pytest.mark.parametrize("name", sorted(set(PAGES) - GENERATED))
def test_no_line_of_a_page_is_too_wide(name):
    assert not too_wide((ROOT / name).read_text())


@pytest.mark.parametrize("name", sorted(PAGES))
def test_no_page_holds_an_unfinished_merge(name):
    assert not re.search(r"^(<{7}|={7}|>{7})", (ROOT / name).read_text(), re.MULTILINE)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= README_WORDS


def test_the_checks_see_what_is_wrong(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A title: `code`, and more\n\n## Twice\n## Twice\n")
    assert anchors(page) == {"a-title-code-and-more", "twice", "twice-1"}
    assert dead_links(page, "[a](#twice-1) [b](#thrice) [c](gone.md) [d](https://x.y)") == [
        "#thrice",
        "gone.md",
    ]
    said = "`rl/train.py`, `replay.py`, `src/there.py`, `a.b`, `rl/gone.py`, `gone.py`"
    assert missing_paths(page, said) == ["rl/gone.py", "gone.py"]
    assert unknown_commands("`trimtab adapt --x` and\n    trimtab fly --high") == ["fly"]
    assert too_wide("| " + 100 * "x" + " |\n" + 101 * "y") == [101 * "y"]
