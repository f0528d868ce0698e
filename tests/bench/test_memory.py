import sys

import pytest
import torch

from bench.memory import MIB, limit, measured, peak_rise

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self")


def test_sees_what_was_held_and_given_back():
    def run():
        torch.ones(64 * MIB // 4)  # given back at once
        return torch.ones(40 * MIB // 4)

    assert 63 * MIB <= peak_rise(run) <= 70 * MIB
    assert peak_rise(lambda: None) <= MIB


def test_the_limit_is_three_times_the_rows():
    assert limit(1000, 32, 1) == 3 * 1000 * 32 * 4 + 8 * 32 * 4 + MIB


@pytest.mark.slow
def test_ours_holds_no_distances_and_the_peer_does():
    N, D, K = 8192, 16, 1024  # N x K floats are 32 MiB, N x D floats half a MiB
    ours, theirs = (measured(module, "rotation", N, D, K) for module in ("metarec_fast", "vector_quantize_pytorch"))
    assert ours < 8 * MIB and theirs > 64 * MIB
