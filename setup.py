"""Builds the C++ extension with CMake and ninja; torch is neither imported nor linked."""

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def find_tool(name: str) -> str:
    """The path of cmake or ninja: on PATH, else in the Python package of that name. Raises RuntimeError."""
    path = shutil.which(name)
    if path is None:
        try:
            package = importlib.import_module(name)
        except ImportError:
            raise RuntimeError(
                f"{name} is needed to build metarec_fast and was not found: pip install {name}"
            ) from None
        path = shutil.which(name, path=getattr(package, "BIN_DIR", None) or package.CMAKE_BIN_DIR)
    return path


def remove_stale(build: Path) -> None:
    """Remove a build folder that CMake would refuse: of other sources, of another generator, of a compiler now gone."""
    cache = build / "CMakeCache.txt"
    if not cache.is_file():
        return
    known = dict(re.findall(r"^(CMAKE_\w+):\w+=(.*)$", cache.read_text(errors="replace"), re.MULTILINE))
    source, compiler = known.get("CMAKE_HOME_DIRECTORY", ""), known.get("CMAKE_CXX_COMPILER", "")
    if known.get("CMAKE_GENERATOR") != "Ninja" or Path(source) != ROOT or shutil.which(compiler) is None:
        shutil.rmtree(build)


class CMakeExtension(Extension):
    def __init__(self, name: str) -> None:
        super().__init__(name, sources=[])


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve() / ext.name
        remove_stale(build)
        build.mkdir(parents=True, exist_ok=True)
        cmake = find_tool("cmake")
        configure = [
            # pip deletes the ninja of an isolated build, which CMake would remember
            f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        subprocess.run([cmake, "-S", ROOT, "-B", build, "-G", "Ninja", *configure], check=True)
        subprocess.run([cmake, "--build", build], check=True)


version = re.search(r'^__version__ = "(.+)"$', (ROOT / "metarec_fast/__init__.py").read_text(), re.MULTILINE)[1]

setup(
    version=version,
    packages=[*find_packages(include=["metarec_fast", "metarec_fast.*"]), "metarec_fast.kernels"],
    package_dir={"metarec_fast.kernels": "kernels"},
    package_data={"metarec_fast": ["py.typed", "study/descriptions/*.json"]},
    ext_modules=[CMakeExtension("metarec_fast._C")],
    cmdclass={"build_ext": CMakeBuild},
)
