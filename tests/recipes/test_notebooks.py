"""The notebooks, from a clean kernel each, at tiny budgets and without a network."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[2] / "notebooks"
NAMES = sorted(path.name for path in FOLDER.glob("*.ipynb"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_from_a_clean_kernel_without_network(name, cache, tmp_path, monkeypatch):
    for key, value in {
        "TRIMTAB_SMALL": "1",
        "TRIMTAB_CACHE": str(cache),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HTTPS_PROXY": "http://127.0.0.1:9",  # whoever asks the network fails
        "HTTP_PROXY": "http://127.0.0.1:9",
        "IPYTHONDIR": str(tmp_path / "ipython"),
    }.items():
        monkeypatch.setenv(key, value)
    book = nbformat.read(FOLDER / name, as_version=4)
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    assert len(cells) >= 4 and not any(cell.outputs or cell.execution_count for cell in cells)
    nbformat.validate(book)
    NotebookClient(
        book, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute(env=dict(os.environ))
    shown = [output for cell in cells for output in cell.outputs if "data" in output]
    assert any("image/png" in output["data"] for output in shown)


def test_the_notebooks_are_numbered_from_one_to_three():
    assert [name[0] for name in NAMES] == ["1", "2", "3"]
