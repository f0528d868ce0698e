import time

import pytest

from metarec_fast.ops.peak import measured_peak, multiply_adds


def test_a_processor_multiplies_faster_than_it_copies():
    peak = measured_peak(1)
    # between a slow core and one of 10 GHz with four 512-bit units
    assert 1e9 < peak.flops < 1e13 and 1e8 < peak.bytes < 1e13
    assert measured_peak(1) is peak


@pytest.mark.parametrize("threads", [1, 2])
def test_the_work_is_done(threads):
    count = 2_000_000_000
    begin = time.perf_counter()
    multiply_adds(count, threads=threads)
    # dropped by the compiler it would take microseconds; no core does 5e11 multiply-adds a second
    assert time.perf_counter() - begin > count / (5e11 * threads)
