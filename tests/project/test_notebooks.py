"""The notebooks run from top to bottom, and their committed outputs match such a run.

nbclient executes them, as it does inside nbmake. We use neither pytest plugin: nbmake looks
only for errors, lets a notebook write to stderr and does not compare with committed outputs;
nbval compares outputs to the character, which fails on pictures and times. The test here
lies between: every cell gives the same kinds of output, and nothing goes to stderr.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.paths import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
REPOSITORY = "ef-optax/ef-optax"
COLAB = f"https://colab.research.google.com/github/{REPOSITORY}/blob/main/notebooks"
GITHUB = f"https://github.com/{REPOSITORY}/blob/main/"
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)")

notebooks = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def source(cell: Any) -> str:
    return "".join(cell["source"])


def cells(notebook: Any, kind: str) -> list[Any]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def kinds(cell: Any) -> list[str]:
    """What a cell shows: text, and the best form of each rich output."""
    return [
        output["name"] if output["output_type"] == "stream" else sorted(output["data"])[0]
        for output in cell["outputs"]
    ]


def test_there_are_notebooks() -> None:
    numbers = [path.name[:2] for path in NOTEBOOKS]
    assert numbers == sorted(set(numbers)) and len(numbers) >= 5


@notebooks
def test_opens_in_colab_and_installs_what_is_missing(path: Path) -> None:
    notebook = read(path)
    badge = f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({COLAB}"
    assert f"{badge}/{path.name})" in source(notebook["cells"][0])

    first = source(cells(notebook, "code")[0])
    assert first == source(cells(read(NOTEBOOKS[0]), "code")[0])
    # JAX reads the environment when it starts, so this comes before any import of it.
    for name in ("JAX_PLATFORMS", "PJRT_NPROC", "XLA_FLAGS"):
        assert 0 <= first.index(name) < first.index("import ef_optax")
    extra = re.search(r'except ImportError:\n    %pip install --quiet "ef-optax\[(\w+)\]"', first)
    assert extra, first
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["name"] == "ef-optax" and extra[1] in project["optional-dependencies"]


@notebooks
def test_outputs_are_those_of_one_whole_run(path: Path) -> None:
    code = cells(read(path), "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    for cell in code:
        for output in cell["outputs"]:
            assert output["output_type"] != "error" and output.get("name") != "stderr", output


@notebooks
def test_nothing_of_the_machine_is_committed(path: Path) -> None:
    notebook, text = read(path), path.read_text(encoding="utf-8")
    assert len(text) < 300_000
    assert all(cell["metadata"] == {} for cell in notebook["cells"])
    assert notebook["metadata"] == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    shown = json.dumps([cell.get("outputs") for cell in notebook["cells"]])
    without_images = re.sub(r'"image/png": "[^"]*"', "", shown)
    assert not re.search(r"/(home|root|tmp|Users|usr|work)/|site-packages", without_images)


@notebooks
def test_every_figure_has_a_caption(path: Path) -> None:
    everything = read(path)["cells"]
    figures = [
        following
        for cell, following in zip(everything, [*everything[1:], None], strict=True)
        if cell["cell_type"] == "code" and "image/png" in kinds(cell)
    ]
    assert figures
    for number, caption in enumerate(figures, 1):
        assert caption is not None and source(caption).startswith(f"**Figure {number}.** *")


@notebooks
def test_links_lead_somewhere(path: Path) -> None:
    for cell in cells(read(path), "markdown"):
        for link in LINK.findall(source(cell)):
            if link.startswith(GITHUB):
                assert (ROOT / link.removeprefix(GITHUB)).is_file(), link
            elif "://" not in link:
                assert (path.parent / link).is_file(), link


@pytest.mark.notebooks
@notebooks
def test_runs(path: Path, tmp_path: Path) -> None:
    """In a fresh kernel, in an empty folder, with nothing set up for it; its asserts hold."""
    import nbclient
    import nbformat

    notebook: Any = nbformat.read(path, as_version=4)
    given = {"JAX_PLATFORMS", "PJRT_NPROC", "XLA_FLAGS", "MPLBACKEND"}
    environment = {name: value for name, value in os.environ.items() if name not in given}
    paths = [str(ROOT), environment.get("PYTHONPATH", "")]  # the package of this checkout
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    folder = {"metadata": {"path": str(tmp_path)}}
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources=folder, coalesce_streams=True
    )
    client.execute(env=environment)

    for fresh, committed in zip(notebook.cells, read(path)["cells"], strict=True):
        if fresh.cell_type == "code":
            assert "stderr" not in kinds(fresh), fresh.outputs
            assert kinds(fresh) == kinds(committed), f"run {path.name} again and commit it"
