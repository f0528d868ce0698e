"""What an import brings along, and how the extension is built."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import metarec_fast

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "metarec_fast"


def python(code: str, *, cwd: Path = ROOT) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_one_openmp_runtime_and_torch_sets_its_threads():
    found = json.loads(
        python(
            "import json, torch, metarec_fast._C as C\n"
            "from threadpoolctl import threadpool_info\n"
            "threads = []\n"
            "for n in (1, 2):\n"
            "    torch.set_num_threads(n)\n"
            "    threads.append(C.max_threads())\n"
            "pools = [p['filepath'] for p in threadpool_info() if p['user_api'] == 'openmp']\n"
            "print(json.dumps({'pools': pools, 'threads': threads}))"
        )
    )
    assert len(found["pools"]) == 1
    assert found["threads"] == [1, 2]


def test_fast_vq_needs_nothing_but_torch_and_little_time():
    code = (
        "import sys, time, torch\n"
        "begin = time.perf_counter()\n"
        "import metarec_fast\n"
        "from metarec_fast import FastVQ\n"
        "seconds = time.perf_counter() - begin\n"
        "heavy = {'triton', 'polars', 'tyro', 'rich', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "print(seconds)"
    )
    assert min(float(python(code)) for _ in range(3)) < 1.0


def test_reports_and_api_import_no_rich():
    python("import sys, metarec_fast.api, metarec_fast.report.table; assert 'rich' not in sys.modules")


@pytest.mark.parametrize("folder", [ROOT, None], ids=["repository", "elsewhere"])
def test_kernels_are_not_a_package_of_their_own(folder, tmp_path):
    python(
        "try:\n    import kernels\nexcept ImportError:\n    pass\nelse:\n    raise SystemExit(f'found {kernels}')",
        cwd=folder or tmp_path,
    )


def test_every_public_name_resolves():
    for name in metarec_fast.__all__:
        assert getattr(metarec_fast, name) is not None
        assert name in dir(metarec_fast)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        metarec_fast.nothing  # noqa: B018


@pytest.fixture
def build_script(monkeypatch):
    """setup.py as a module, without its call of setup."""
    setuptools = pytest.importorskip("setuptools", reason="setuptools is not installed")
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    spec = importlib.util.spec_from_file_location("build_script", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_build_names_its_own_ninja(build_script, monkeypatch, tmp_path):
    """CMake would remember that of the build before, which pip has deleted with its environment."""
    from setuptools import Distribution

    calls = []
    monkeypatch.setattr(build_script.subprocess, "run", lambda command, check: calls.append(list(map(str, command))))
    monkeypatch.setitem(sys.modules, "pybind11", SimpleNamespace(get_cmake_dir=lambda: "where pybind11 is"))
    monkeypatch.setenv("CMAKE_ARGS", "-DA=1 '-DB=a b'")
    for environment in ("first env", "second env"):
        for tool in ("cmake", "ninja"):
            path = tmp_path / environment / tool
            path.parent.mkdir(exist_ok=True)
            path.touch(mode=0o755)
        monkeypatch.setenv("PATH", str(tmp_path / environment))
        extension = build_script.CMakeExtension("metarec_fast._C")
        command = build_script.CMakeBuild(Distribution({"ext_modules": [extension]}))
        command.build_temp, command.build_lib = str(tmp_path / "build"), str(tmp_path / "lib")
        command.ensure_finalized()
        command.build_extension(extension)
        configure, build = calls[-2:]
        assert configure[0] == build[0] == str(tmp_path / environment / "cmake")
        assert f"-DCMAKE_MAKE_PROGRAM={tmp_path / environment / 'ninja'}" in configure
        assert configure[-2:] == ["-DA=1", "-DB=a b"]


@pytest.mark.parametrize("other", [None, "CMAKE_GENERATOR", "CMAKE_HOME_DIRECTORY", "CMAKE_CXX_COMPILER"])
def test_a_build_folder_that_cmake_would_refuse_is_made_anew(other, build_script, tmp_path):
    build_script.remove_stale(tmp_path / "none yet")
    known = {"CMAKE_GENERATOR": "Ninja", "CMAKE_HOME_DIRECTORY": str(ROOT), "CMAKE_CXX_COMPILER": sys.executable}
    if other:
        known[other] = "/gone or different"
    build = tmp_path / "a build"
    build.mkdir()
    (build / "CMakeCache.txt").write_text("# cache\n" + "".join(f"{k}:INTERNAL={v}\n" for k, v in known.items()))
    build_script.remove_stale(build)
    assert build.exists() == (other is None)


def test_a_missing_build_tool_is_named(build_script, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "ninja", None)
    with pytest.raises(RuntimeError, match="ninja is needed to build metarec_fast and was not found: pip install"):
        build_script.find_tool("ninja")
