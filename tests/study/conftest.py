import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def threads_as_before():
    """Studies set torch's threads; other tests should not notice."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
