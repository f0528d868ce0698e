from metarec_fast.ops.peak import measured_peak


def test_a_processor_multiplies_faster_than_it_copies():
    peak = measured_peak(1)
    # between a slow core and one of 10 GHz with four 512-bit units
    assert 1e9 < peak.flops < 1e13 and 1e8 < peak.bytes < 1e13
    assert measured_peak(1) is peak
