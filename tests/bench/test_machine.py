from bench.machine import cpu_name, device_name, slug

CPUINFO = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: {family}
model\t\t: 17
model name\t: AMD EPYC
stepping\t: 1
"""


def test_generations_of_one_name_have_files_of_their_own():
    names = [cpu_name(CPUINFO.format(family=family)) for family in (25, 26)]
    assert names == ["AMD EPYC family 25 model 17", "AMD EPYC family 26 model 17"]
    assert slug(names[0]) == "amd-epyc-family-25-model-17"


def test_other_processors_keep_the_name_they_have():
    assert cpu_name("model name : Some Core\n") == "Some Core"
    assert cpu_name("Hardware : none\n") is None
    assert device_name("cpu")
