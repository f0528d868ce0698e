"""README, docs and CONTRIBUTING name only what exists: pages, headings, files, options, names; README's code runs."""

import importlib
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import metarec_fast as mf

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
CURRENT = [page for page in PAGES if page.parent.name != "log" and page.name != "CHANGELOG.md"]  # of what is now
LINK = re.compile(r"\]\(([^()\s]+)\)")
PATH = re.compile(r"\b(?:metarec_fast|csrc|kernels|bench|tests|docs|experiments)/[\w./<>-]*[\w>/]")
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z.-]*[a-z]")
SETTING = re.compile(r"`(model|meta|train|cooccurrence|data)\.([a-z_]+)\b(?!\()")
NAME = re.compile(r"`(?:mf|metarec_fast)((?:\.[A-Za-z_]\w*)+)")
GENERAL_FLAGS = {"--preset", "--config", "--help"}  # of three commands, read before their own
OTHER_FLAGS = {"--all", "--benchmark-only", "--quick", "--no-build-isolation"}  # of pytest, bench/scaling.py and pip

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
each_current_page = pytest.mark.parametrize("page", CURRENT, ids=lambda p: str(p.relative_to(ROOT)))


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", read(page), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def goals(page: Path) -> list[tuple[str, Path, str]]:
    """Link, file and anchor of every relative link."""
    links = [link for link in LINK.findall(read(page)) if not re.match(r"[a-z]+:", link)]
    parts = [link.partition("#") for link in links]
    return [
        (link, (page.parent / path).resolve() if path else page, a)
        for link, (path, _, a) in zip(links, parts, strict=True)
    ]


@cache
def flags() -> set[str]:
    """Of all commands, from their help."""
    code = "import sys; sys.argv[0] = 'metarec-fast'; from metarec_fast.cli import main; main()"

    def shown(*arguments: str) -> str:
        run = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT)
        return run.stdout

    commands = re.findall(r"^  ([a-z-]+) +[A-Z]", shown("--help"), re.MULTILINE)
    assert {"train", "audit-transfer"} <= set(commands)
    return GENERAL_FLAGS.union(*(FLAG.findall(shown(command, "--help")) for command in commands))


def exists(name: str) -> bool:
    """Whether a dotted name can be imported, or reached from a module that can be."""
    module, _, attribute = name.rpartition(".")
    try:
        importlib.import_module(name)
        return True
    except ImportError:
        pass
    try:
        return hasattr(importlib.import_module(module), attribute)
    except ImportError:
        return False


@each_page
def test_links_lead_somewhere(page):
    for link, goal, anchor in goals(page):
        assert goal.is_relative_to(ROOT) and goal.exists(), link
        assert not anchor or anchor in anchors(goal), f"{link} names a heading that is not there"


@each_page
def test_every_page_is_linked(page):
    assert page == README or any(goal == page for other in PAGES if other != page for _, goal, _ in goals(other))


@each_current_page
def test_named_paths_exist(page):
    for path in PATH.findall(LINK.sub("]", read(page))):
        if "<" not in path:  # a placeholder
            assert (ROOT / path).exists(), path


@each_current_page
def test_named_options_exist(page):
    assert set(FLAG.findall(read(page))) - OTHER_FLAGS <= flags()
    for section, option in SETTING.findall(read(page)):
        of_model = section == "model" and option in ("config", "history")  # a MetaRec named so in an example
        assert of_model or hasattr(getattr(mf.Config(), section), option), f"{section}.{option}"


@each_current_page
def test_named_attributes_exist(page):
    for name in NAME.findall(read(page)):
        assert exists("metarec_fast" + name), name


def test_the_checks_see_what_is_wrong(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A b\n[x](other.md#c), `bench/none.py`, `--nothing-of-ours`, `mf.Nothing`, `model.nothing`\n")
    assert goals(page) == [("other.md#c", tmp_path / "other.md", "c")] and anchors(page) == {"a-b"}
    assert PATH.findall(read(page)) == ["bench/none.py"] and "--nothing-of-ours" not in flags()
    assert not exists("metarec_fast.Nothing") and exists("metarec_fast.vq.verify")
    assert SETTING.findall(read(page)) == [("model", "nothing")] and not hasattr(mf.Config().model, "nothing")


def test_the_lines_about_fast_vq_run():
    """README's four lines; the two modules give the same codes from one state."""
    pytest.importorskip("vector_quantize_pytorch")
    import torch

    example = re.findall(r"```python\n(.*?)```", read(README), re.DOTALL)[0]
    *imports, before, after = [line for line in example.splitlines() if line]
    assert len(imports) == 2
    modules = []
    for line in (before, after):
        scope = {}
        exec("\n".join([*imports, line]), scope)
        modules.append(scope["vq"].eval())
    upstream, ours = modules
    ours.load_state_dict(upstream.state_dict())
    x = torch.randn(2, 100, 256, generator=torch.Generator().manual_seed(0))
    (expected, expected_indices, _), (quantized, indices, _) = upstream(x), ours(x)
    assert torch.equal(indices, expected_indices)
    torch.testing.assert_close(quantized, expected)
