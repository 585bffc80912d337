"""The table of policies that `trimtab policies` prints."""

import json

import pytest

from tests.helpers.tiny import TYPES
from trimtab.recipes.cli import main
from trimtab.recipes.cli.policies import MANY

HEADER = (
    "| policy | noise of one sample | draws | deterministic | prefix share | 16 noises / 1 | counted on |"
)


def rows(text):
    """Cells of a Markdown table without its header."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_table_of_some_types(capsys, tmp_path):
    output = tmp_path / "rows.json"
    assert main(["policies", "--types=act,evo1", f"--output={output}"]) == 0
    text = capsys.readouterr().out
    assert text.splitlines()[0] == HEADER and len(text.splitlines()) == 4
    act, evo1 = rows(text)
    assert act[:4] == ["`act`", "(32,)", "zero", "yes"] and act[-1] == "52 M"
    assert evo1[0] == "`evo1`" and evo1[2:4] == ["uniform", "yes"] and "inert" in evo1[1]
    saved = json.loads(output.read_text())
    assert [row["type"] for row in saved] == ["act", "evo1"]
    for row, cells in zip(saved, (act, evo1)):
        assert 0 < row["share"] < 1 and 1 < row["many"] < MANY and row["chunk_flops"] > 0
        assert cells[4] == f"{100 * row['share']:.0f} %" and cells[5] == f"{row['many']:.1f}"
        assert str(tuple(row["noise"])) in cells[1]


def test_all_types_are_in_the_table(capsys):
    assert main(["policies"]) == 0
    assert [cells[0] for cells in rows(capsys.readouterr().out)] == [f"`{name}`" for name in TYPES]


BAD = {
    "--types=act,sac": "--types: no policy type sac; there are act",
    "--tipes=act": "--tipes: no such option",
}


@pytest.mark.parametrize("option", BAD)
def test_bad_option(option, capsys):
    assert main(["policies", option]) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 and BAD[option] in lines[0] and captured.out == ""
