"""Every way to install from a checkout, what a source distribution and a wheel hold, and how the extension is built."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from metarec_fast import __version__

ROOT = Path(__file__).parents[2]
NOT_SOURCES = shutil.ignore_patterns(".[!c]*", "build", "dist", "runs", "shared", "*.egg-info", "*.so", "__pycache__")


def run(*command, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, cwd=cwd, env=os.environ | environment, timeout=1500
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def checkout(tmp_path) -> Path:
    """The sources, in a path with spaces, with one module more."""
    folder = tmp_path / "a checkout"
    shutil.copytree(ROOT, folder, symlinks=True, ignore=NOT_SOURCES)
    (folder / "metarec_fast/removed_later.py").touch()
    return folder


def replace(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert text.count(old) == 1
    file.write_text(text.replace(old, new))


@pytest.mark.slow
def test_every_way_to_install_after_every_other(checkout, tmp_path):
    """As after git pull: nothing is compiled twice, nothing removed stays, and no build needs a tool of one before."""
    environment = tmp_path / "an environment"
    run(sys.executable, "-m", "venv", environment, cwd=tmp_path)
    python = environment / "bin/python"

    def install(*what: str) -> tuple[dict, dict]:
        """What the environment has now, and when each object file was compiled."""
        fast = "-DCMAKE_BUILD_TYPE=None"  # without optimization
        run(python, "-m", "pip", "install", "--no-deps", *what, cwd=checkout, CMAKE_ARGS=fast)
        code = (
            "import importlib.metadata as metadata, importlib.util as util, json, metarec_fast as package\n"
            "from metarec_fast import _C\n"
            "distribution = metadata.distribution('metarec-fast')\n"
            "print(json.dumps({'home': package.__path__[0], 'version': package.__version__,\n"
            "    'metadata': distribution.version, 'isas': _C.supported_isas(), '_C': _C.__file__,\n"
            "    'removed': util.find_spec('metarec_fast.removed_later') is not None,\n"
            "    'files': [str(file) for file in distribution.files]}))"
        )
        now = json.loads(run(python, "-c", code, cwd=tmp_path))
        return now, {file.name: file.stat().st_mtime_ns for file in checkout.glob("build/**/*.o")}

    first, compiled = install(".")
    assert first["removed"] and first["version"] == first["metadata"] == __version__
    assert Path(first["home"]).is_relative_to(environment) and "baseline" in first["isas"]
    assert {"metarec_fast/py.typed", "metarec_fast/kernels/__init__.py"} <= set(first["files"])
    assert not any(file.startswith(("tests", "kernels", "csrc")) for file in first["files"])

    again, compiled_again = install(".")
    assert again == first and compiled_again == compiled

    (checkout / "metarec_fast/removed_later.py").unlink()
    replace(checkout / "metarec_fast/__init__.py", f'__version__ = "{__version__}"', '__version__ = "99.1"')
    replace(checkout / "csrc/core/isa.cpp", 'return "baseline"', 'return "renamed"')
    upgraded, compiled_now = install(".")
    assert {name for name in compiled if compiled[name] != compiled_now[name]} == {"isa.cpp.o"}
    assert upgraded["version"] == upgraded["metadata"] == "99.1" and "renamed" in upgraded["isas"]
    assert not upgraded["removed"]

    editable, compiled_editable = install("-e", ".")
    assert compiled_editable == compiled_now and editable["version"] == "99.1"
    assert Path(editable["home"]) == checkout / "metarec_fast" and Path(editable["_C"]).is_relative_to(checkout)

    requirements = re.search(r"^requires = (\[.*\])$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    run(python, "-m", "pip", "install", *json.loads(requirements), cwd=tmp_path)
    last, compiled_last = install("--no-build-isolation", ".")
    assert last == upgraded and compiled_last == compiled_now


def test_build_holds_what_the_package_has_and_nothing_removed(checkout, tmp_path):
    def build() -> set[str]:
        run(sys.executable, "setup.py", "-q", "build_py", "--build-lib", tmp_path / "lib", cwd=checkout)
        return {str(file.relative_to(tmp_path / "lib")) for file in (tmp_path / "lib").rglob("*") if file.is_file()}

    assert "metarec_fast/removed_later.py" in build()
    (checkout / "metarec_fast/removed_later.py").unlink()
    files = build()
    package = {str(file.relative_to(checkout)) for file in checkout.glob("metarec_fast/**/*.*") if file.is_file()}
    kernels = {f"metarec_fast/{file.relative_to(checkout)}" for file in checkout.glob("kernels/**/*.py")}
    assert "metarec_fast/py.typed" in files and files == package | kernels


def test_source_distribution_holds_tests_and_licence_and_the_only_version(checkout, tmp_path):
    replace(checkout / "metarec_fast/__init__.py", f'__version__ = "{__version__}"', '__version__ = "99.1"')
    run(sys.executable, "setup.py", "-q", "sdist", "--dist-dir", tmp_path, cwd=checkout)
    with tarfile.open(tmp_path / "metarec_fast-99.1.tar.gz") as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        assert b"\nVersion: 99.1\n" in archive.extractfile("metarec_fast-99.1/PKG-INFO").read()
    needed = {"LICENSE", "README.md", "Makefile", "CMakeLists.txt", "pyproject.toml", "setup.py", "tests/conftest.py"}
    for folder in ("tests", "csrc", "kernels", "metarec_fast", "experiments", "docs", "bench"):
        files = (file for file in (checkout / folder).rglob("*") if file.is_file() and "__pycache__" not in file.parts)
        needed |= {str(file.relative_to(checkout)) for file in files}
    assert needed <= names
    assert not {name for name in names if name.endswith((".so", ".pyc", ".o"))}


def test_one_compile_serves_demo_and_test(checkout):
    def recipes(target: str) -> str:
        return run("make", "-n", target, cwd=checkout)

    assert recipes("demo").count(" -e .") == 1
    (checkout / ".venv").mkdir()
    for done in ("torch", "tools", "base"):  # as make demo leaves them
        (checkout / f".venv/{done}.done").touch()
    assert " -e ." not in recipes("demo") + recipes("test") + recipes("wheel")
    assert "metarec-fast[test]" in recipes("test")
    os.utime(checkout / "csrc/core/isa.cpp")
    assert recipes("demo").count(" -e .") == 1


def test_torch_is_no_build_requirement():
    requirements = re.search(r"^requires = (\[.*\])$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert {re.split("[>=<]", name)[0] for name in json.loads(requirements)} == {
        "setuptools",
        "pybind11",
        "cmake",
        "ninja",
    }


@pytest.fixture
def build_script(monkeypatch):
    """setup.py as a module, without its call of setup."""
    setuptools = pytest.importorskip("setuptools", reason="setuptools is not installed")
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    spec = importlib.util.spec_from_file_location("build_script", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_build_names_its_own_tools_and_the_same_headers(build_script, monkeypatch, tmp_path):
    """CMake would remember those of the build before, which pip has deleted with its environment."""
    from setuptools import Distribution

    monkeypatch.setattr(build_script, "ROOT", tmp_path)
    for tool in ("cmake", "ninja"):
        monkeypatch.setitem(sys.modules, tool, None)
    monkeypatch.setenv("CMAKE_ARGS", "-DA=1 '-DB=a b'")
    calls = []

    def cmake(command, check):
        calls.append(list(map(str, command)))
        build = Path(calls[-1][calls[-1].index("--build") + 1] if "--build" in command else command[4])
        assert "--build" in command or not (build / "CMakeCache.txt").exists()
        for made in ("CMakeCache.txt", "CMakeFiles/3.30.1/compiler", "CMakeFiles/_C.dir/an.o", output.name):
            (build / made).parent.mkdir(parents=True, exist_ok=True)
            (build / made).touch()

    monkeypatch.setattr(build_script.subprocess, "run", cmake)
    headers = set()
    for environment in ("first env", "second env"):
        folder = tmp_path / environment
        for file in ("cmake", "ninja", "include/pybind11/pybind11.h", "share/pybind11Config.cmake"):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).touch(mode=0o755)
        found = {"get_include": lambda at=folder: str(at / "include"), "get_cmake_dir": lambda at=folder: at / "share"}
        monkeypatch.setitem(sys.modules, "pybind11", SimpleNamespace(__version__="3.0.1", **found))
        monkeypatch.setenv("PATH", str(folder))
        extension = build_script.CMakeExtension("metarec_fast._C")
        command = build_script.CMakeBuild(Distribution({"ext_modules": [extension]}))
        command.build_temp, command.build_lib = str(tmp_path / "temp"), str(tmp_path / "lib")
        command.ensure_finalized()
        output = Path(command.get_ext_fullpath(extension.name))
        command.build_extension(extension)
        configure, build = calls[-2:]
        assert configure[0] == build[0] == str(folder / "cmake")
        assert f"-DCMAKE_MAKE_PROGRAM={folder / 'ninja'}" in configure
        assert configure[-2:] == ["-DA=1", "-DB=a b"]
        headers.add(next(option for option in configure if option.startswith("-Dpybind11_DIR=")))
        shutil.rmtree(folder)
        assert output.is_file() and (Path(build[-1]) / "CMakeFiles/_C.dir/an.o").is_file()
    assert len(headers) == 1
    assert (Path(headers.pop().partition("=")[2]) / "pybind11Config.cmake").is_file()


def test_a_package_comes_before_the_tool_on_path(build_script, monkeypatch, tmp_path):
    (tmp_path / "ninja").touch(mode=0o755)
    monkeypatch.setitem(sys.modules, "ninja", SimpleNamespace(BIN_DIR=tmp_path))
    assert build_script.find_tool("ninja") == str(tmp_path / "ninja")
    # as ninja's package is in an isolated build of pip, which puts it on PATH
    monkeypatch.setitem(sys.modules, "ninja", SimpleNamespace(BIN_DIR=""))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build_script.find_tool("ninja") == str(tmp_path / "ninja")


def test_a_missing_build_tool_is_named(build_script, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "ninja", None)
    with pytest.raises(RuntimeError, match="ninja is needed to build metarec_fast and was not found: pip install"):
        build_script.find_tool("ninja")
