"""What an import brings along."""

import json
import subprocess
import sys
from pathlib import Path

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
