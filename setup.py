"""Builds the C++ extension with CMake and ninja; torch is neither imported nor linked."""

import os
import re
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeExtension(Extension):
    def __init__(self, name: str) -> None:
        super().__init__(name, sources=[])


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve() / ext.name
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            *os.environ.get("CMAKE_ARGS", "").split(),
        ]
        subprocess.run(["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", *configure], check=True)
        subprocess.run(["cmake", "--build", build], check=True)


version = re.search(r'^__version__ = "(.+)"$', (ROOT / "metarec_fast/__init__.py").read_text(), re.MULTILINE)[1]

setup(
    version=version,
    packages=[*find_packages(include=["metarec_fast", "metarec_fast.*"]), "metarec_fast.kernels"],
    package_dir={"metarec_fast.kernels": "kernels"},
    package_data={"metarec_fast": ["py.typed"]},
    ext_modules=[CMakeExtension("metarec_fast._C")],
    cmdclass={"build_ext": CMakeBuild},
)
