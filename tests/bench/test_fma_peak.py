import shutil
import time

import pytest

from bench.fma_peak import compiled
from metarec_fast.ops import backend_info

VECTORS = [isa for isa in ("avx2", "avx512") if isa in backend_info()["cpu"]["supported_isas"]]


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("isa", VECTORS)
@pytest.mark.parametrize("threads", [1, 2])
def test_the_work_is_done(isa, threads):
    run, count = compiled(isa), 2_000_000_000
    begin = time.perf_counter()
    run(count, threads)
    # dropped by the compiler it would take microseconds; no core does 5e11 multiply-adds a second
    assert time.perf_counter() - begin > count / (5e11 * threads)


def test_an_instruction_set_without_vectors_here_is_named():
    with pytest.raises(KeyError, match="baseline"):
        compiled("baseline")
