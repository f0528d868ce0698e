import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread():
    """Tensors here are tiny: threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def parity_steps(request, everything):
    """Steps of training over which a case is compared with its peer: 5, or 50 where its module names it in LONG."""
    return 50 if everything or request.node.callspec.params["name"] in request.module.LONG else 5
