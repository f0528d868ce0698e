"""Builds the C++ extension with CMake and ninja; torch is neither imported nor linked."""

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


def find_tool(name: str) -> str:
    """The path of cmake or ninja: that of the Python package, else the one on PATH. Raises RuntimeError."""
    try:
        package = importlib.import_module(name)
        folder = getattr(package, f"{name.upper()}_BIN_DIR", None) or getattr(package, "BIN_DIR", None)
    except ImportError:
        folder = None
    path = (folder and shutil.which(name, path=folder)) or shutil.which(name)
    if path is None:
        raise RuntimeError(f"{name} is needed to build metarec_fast and was not found: pip install {name}")
    return path


def forget_tools(build: Path) -> None:
    """Remove what CMake remembers of cmake, ninja, compiler and sources, which may be gone or moved; objects stay."""
    (build / "CMakeCache.txt").unlink(missing_ok=True)
    for folder in build.glob("CMakeFiles/[0-9]*"):
        shutil.rmtree(folder)


def copy_pybind11(build: Path) -> Path:
    """pybind11's headers inside the build folder, as a folder for CMake to find.

    pip gives each isolated build a pybind11 of another path, and with another path everything would be compiled again.
    """
    import pybind11

    copy = build / f"pybind11-{pybind11.__version__}"
    config = copy / "share/cmake/pybind11"
    if not config.is_dir():
        headers = Path(pybind11.get_include(), "pybind11")
        shutil.copytree(headers, copy / "include/pybind11", dirs_exist_ok=True)
        shutil.copytree(pybind11.get_cmake_dir(), copy / "unfinished", dirs_exist_ok=True)
        config.parent.mkdir(parents=True, exist_ok=True)
        (copy / "unfinished").rename(config)
    return config


class CMakeExtension(Extension):
    def __init__(self, name: str) -> None:
        super().__init__(name, sources=[])


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        # one folder for every way to install, since an editable install has no lasting one of its own
        build = ROOT / "build" / sysconfig.get_config_var("SOABI")
        build.mkdir(parents=True, exist_ok=True)
        forget_tools(build)
        output = Path(self.get_ext_fullpath(ext.name))
        cmake = find_tool("cmake")
        configure = [
            f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={build}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={copy_pybind11(build)}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        subprocess.run([cmake, "-S", ROOT, "-B", build, "-G", "Ninja", *configure], check=True)
        subprocess.run([cmake, "--build", build], check=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(build / output.name), str(output))


class PythonBuild(build_py):
    def run(self) -> None:
        # a module removed since the last build would still be there, and go into the wheel
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


version = re.search(r'^__version__ = "(.+)"$', (ROOT / "metarec_fast/__init__.py").read_text(), re.MULTILINE)[1]

setup(
    version=version,
    packages=[*find_packages(include=["metarec_fast", "metarec_fast.*"]), "metarec_fast.kernels"],
    package_dir={"metarec_fast.kernels": "kernels"},
    package_data={"metarec_fast": ["py.typed", "study/descriptions/*.json"]},
    ext_modules=[CMakeExtension("metarec_fast._C")],
    cmdclass={"build_ext": CMakeBuild, "build_py": PythonBuild},
)
