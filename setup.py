"""Builds the one compiled module, ``kernels._C``, with CMake; pyproject.toml declares everything else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    import pybind11
except ModuleNotFoundError:
    sys.exit("pybind11 is missing: install it (pip install pybind11) and try again")

ROOT = Path(__file__).resolve().parent
PACKAGES = [
    "kernels", "kernels.gpu", "models", "models.chat", "models.families", "models.gguf", "models.vocabularies",
    "engine", "train", "train.data", "tools", "tools.export", "tools.profile",
]  # fmt: skip


class CMakeBuild(build_ext):
    """Configures and builds CMakeLists.txt; ``TANDEM_SANITIZE=address`` or ``thread`` asks for that sanitizer."""

    def build_extension(self, ext: Extension) -> None:
        cmake = shutil.which("cmake")
        if cmake is None:
            sys.exit("cmake is missing: install it (pip install cmake) and try again")
        if not any(map(shutil.which, [os.environ.get("CXX", "c++"), "g++", "clang++"])):
            sys.exit("a C++17 compiler is missing: install g++ or clang++ and try again")
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        ninja = shutil.which("ninja")
        # CMake remembers its generator and Python, so each combination has a folder of its own.
        sanitizer = os.environ.get("TANDEM_SANITIZE", "")
        build = (
            ROOT / "build" / f"{sanitizer or 'release'}-{sys.implementation.cache_tag}-{'ninja' if ninja else 'make'}"
        )
        configure = [
            cmake,
            f"-S{ROOT}",
            f"-B{build}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DTANDEM_OUTPUT_DIRECTORY={target.parent}",
            f"-DTANDEM_SANITIZE={sanitizer}",
        ]
        # Named each time: the one remembered may have been in a build environment of pip, since gone.
        if ninja:
            configure += ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(build), "--parallel"], check=True)


setup(
    packages=PACKAGES,
    package_data={"kernels": ["_C.pyi"], "kernels.gpu": ["*.json"], "tools.profile": ["*.json"]},
    ext_modules=[Extension("kernels._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
