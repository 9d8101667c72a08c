"""The examples run as they stand."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from models.families import FAMILIES

ROOT = Path(__file__).parent.parent


def test_a_notebook_cell_starts_training(tmp_path: Path) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    for name in ("configs", "examples"):
        shutil.copytree(ROOT / name, tmp_path / name)
    notebook = nbformat.read(tmp_path / "examples" / "train.ipynb", as_version=4)
    setup = f"import os, sys; os.environ['PATH'] = {str(Path(sys.executable).parent)!r} + ':' + os.environ['PATH']; "
    setup += f"os.environ['PYTHONPATH'] = {str(ROOT)!r}; sys.path.insert(0, {str(ROOT)!r}); "
    setup += "os.environ['OMP_NUM_THREADS'] = '1'"
    notebook.cells.insert(0, nbformat.v4.new_code_cell(setup))
    nbclient.NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "60 steps, from scratch, 2 x cpu" in printed
    assert "tandem ->" in printed


def test_the_demo_ends_in_its_phone_error_rate(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "examples.pronounce", "--config", "configs/g2p_demo.yaml", "training.max_steps=20",
               "model.dim=32", "model.depth=1", "model.encoder_depth=1", "training.name=demo",
               "training.eval_samples=20", "data.num_train_samples=5000",
               f"training.output_dir={tmp_path}"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    last = done.stdout.strip().splitlines()[-1]
    assert last.startswith("phone error rate: ")
    assert last.endswith("%")
    assert "unseen words" in done.stdout


def test_toy_tasks_refuse_an_unknown_one() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "examples.toy_tasks", "chess"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.strip().startswith("error: unknown task 'chess'")


def test_the_page_on_families_quotes_its_example() -> None:
    page = (ROOT / "docs" / "families.md").read_text()
    quoted = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert len(quoted) == 4
    code = (ROOT / "examples" / "annalog_family.py").read_text()
    for block in quoted:
        assert block in code


def test_the_page_on_families_lists_them_all() -> None:
    page = (ROOT / "docs" / "families.md").read_text()
    listed = re.findall(r"^\| `(\w+)` \|", page, flags=re.MULTILINE)
    assert sorted(listed) == sorted(set(FAMILIES) - {"annalog"})  # which an example adds
