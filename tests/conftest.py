import os
import signal
import sys

os.environ.setdefault("OMP_NUM_THREADS", "2")

import pytest
import torch
from hypothesis import settings

from metarec_fast.ops import register

slow = pytest.StashKey[int]()


def pytest_addoption(parser):
    parser.addoption(
        "--all", action="store_true", help="run tests marked slow, all examples and all steps of parity too"
    )


def pytest_configure(config):
    import tests.examples  # noqa: F401  registers the profiles, before a test module asks for one

    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell ignores it for what runs in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    settings.load_profile("all" if config.getoption("--all") else "gate")
    config.stash[slow] = 0


@pytest.fixture(scope="session")
def everything(request):
    """Whether this is ``pytest --all``."""
    return request.config.getoption("--all")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def poison(monkeypatch):
    """Outputs start as NaN (or the smallest integer): an element that a kernel forgets to write shows."""

    def poisoned(shape, *, dtype, device):
        fill = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min
        return torch.full(shape, fill, dtype=dtype, device=device)

    for name, module in list(sys.modules.items()):
        if name.startswith("metarec_fast") and getattr(module, "empty", None) is register.empty:
            monkeypatch.setattr(module, "empty", poisoned)


def pytest_collection_modifyitems(config, items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device; none is available")
        for item in items:
            if item.get_closest_marker("gpu"):  # keywords would have folders of that name too
                item.add_marker(skip)
    if config.getoption("--all"):
        return
    left = [item for item in items if item.get_closest_marker("slow")]
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]
    config.stash[slow] = len(left)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """With pytest-xdist the workers collect, each all tests."""
    node.config.stash[slow] = max(node.config.stash[slow], getattr(node, "workeroutput", {}).get("slow", 0))


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["slow"] = session.config.stash[slow]


def pytest_terminal_summary(terminalreporter, config):
    if config.stash[slow]:
        terminalreporter.write_line(f"{config.stash[slow]} slow tests are left to make test-all (pytest --all)")
