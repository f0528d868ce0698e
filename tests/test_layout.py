"""Which part of the package may import which, and the words that its names are made of."""

import ast
import io
import re
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "metarec_fast"

# Imports run down this list only.
LAYERS = [
    "cli",
    "study",
    "api",
    "inputs",
    "report",
    "train",
    "persistence",
    "cooccurrence",
    "models",
    "meta",
    "evaluation",
    "sampling",
    "statistics",
    "data",
    "vq",
    "profiling",
    "ops",
]
LEAVES = {"checks", "files", "text"}  # may be imported by all, and import nothing of ours
BELOW = {layer: set(LAYERS[i + 1 :]) for i, layer in enumerate(LAYERS)}
ALLOWED = {layer: below | {layer, "config", *LEAVES} for layer, below in BELOW.items()}
ALLOWED["report"].discard("train")  # a run reports; neither knows the other
ALLOWED["meta"].discard("evaluation")
ALLOWED["ops"] = {"ops", *LEAVES, "reference", "_C", "kernels"}
ALLOWED["__main__"] = {"cli"}
ALLOWED |= {"reference": {"reference"}, "kernels": {"kernels"}, "config": {"checks"}}
ALLOWED |= {leaf: set() for leaf in LEAVES}
THIRD_PARTY = {  # beyond torch and numpy
    "cli": {"tyro", "rich"},
    "persistence": {"safetensors"},
    "report": {"rich"},
    "train": {"safetensors"},
    "data": {"polars", "safetensors"},
    "kernels": {"triton"},
}
FILES = {
    **{path: path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in PACKAGE.rglob("*.py")},
    **dict.fromkeys((ROOT / "kernels").glob("*.py"), "kernels"),
}
del FILES[PACKAGE / "__init__.py"]
PACKAGES = {".".join(path.parent.relative_to(ROOT).parts) for path in FILES if path.name == "__init__.py"}
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in FILES}


def imports(path: Path) -> set[str]:
    """The full name of every module, and of every name of a module, that a file imports anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports by a relative name"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def module_of(name: str) -> str:
    """``name`` itself, or the module of ours that holds it."""
    return name if name in MODULES else name.rpartition(".")[0]


def test_parts_of_quantizers_are_below_vq_and_read_by_it_alone():
    for path, part in FILES.items():
        ours = {name for name in imports(path) if name.startswith("metarec_fast.vq")}
        parts = {name for name in ours if name.startswith("metarec_fast.vq.parts")}
        if part != "vq":
            assert not parts, path
        elif path.parent.name == "parts":
            assert ours == parts, path


def test_models_quantize_by_the_public_functions_of_vq():
    for path, part in FILES.items():
        if part == "models":
            names = {name.rpartition(".")[2] for name in imports(path) if name.startswith("metarec_fast.ops")}
            assert not {name for name in names if name.startswith(("vq_", "nearest_", "gradient_estimators"))}, path
    assert "metarec_fast.vq.functional.quantize_learned" in imports(PACKAGE / "models/recommender.py")


def test_every_part_has_its_place():
    assert set(FILES.values()) == set(ALLOWED)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path):
    layer = FILES[path]
    for name in imports(path):
        top, _, rest = name.partition(".")
        if top == "metarec_fast":
            part = rest.split(".")[0]
            assert part in ALLOWED[layer] or part == "__version__", f"{layer} must not import {name}"
        elif top not in sys.stdlib_module_names:
            allowed = {"torch", "numpy"} | THIRD_PARTY.get(layer, set())
            assert top in (allowed - {"numpy"} if layer == "kernels" else allowed), f"{layer} must not import {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_private_name_crosses_a_folder(path):
    own = ("metarec_fast", "kernels") if FILES[path] == "kernels" else path.parent.relative_to(ROOT).parts
    for name in imports(path):
        parts = tuple(name.split("."))
        for i, part in enumerate(parts):
            if parts[0] == "metarec_fast" and part.startswith("_") and part not in ("_C", "__version__"):
                home = parts[: i - 1] if ".".join(parts[:i]) in MODULES - PACKAGES else parts[:i]
                assert own[: len(home)] == home, f"{path} imports the private {name}"


def test_no_two_modules_import_each_other():
    edges = {}
    for path in FILES:
        own = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        edges[own] = {module_of(name) for name in imports(path)} & MODULES - {own}
    open_, done = [], set()

    def visit(module: str) -> None:
        assert module not in open_, " -> ".join([*open_[open_.index(module) :], module])
        if module not in done:
            open_.append(module)
            for other in sorted(edges[module]):
                visit(other)
            done.add(open_.pop())

    for module in sorted(edges):
        visit(module)


def test_the_rules_see_what_they_forbid(tmp_path):
    path = tmp_path / "x.py"
    path.write_text("def f():\n    from metarec_fast import _C\n    import metarec_fast.cli, polars.selectors\n")
    assert imports(path) == {"metarec_fast._C", "metarec_fast.cli", "polars.selectors"}
    assert "_C" not in ALLOWED["data"] and "kernels" not in ALLOWED["vq"] and "cli" not in ALLOWED["api"]


# words of this project's own that the field does not know, and the field's words for them
OWN_WORDS = {
    "evidence": "co-occurrence",
    "asked": "query, requested",
    "question": "query, case",
    "questions": "queries, cases",
    "settle": "refine",
    "settled": "resolved",
    "unsettled": "unresolved",
    "clump": "near-duplicate cluster",
    "clumps": "near-duplicate clusters",
    "facts": "metrics, manifest, record",
    "told": "reported",
    "answers": "targets, target_gradients",
    "falls": "decreases, linear_decay",
    "filled": "padded",
    "floor": "baseline, roofline",
    "floors": "baselines, rooflines",
    "remember": "cache",
    "remembered": "cached",
}
ELSEWHERE = {"floor", "NoiseFloor", "__builtin_floor"}  # math.floor; the noise floor has its own name
CODE = sorted(
    path
    for folder in ("metarec_fast", "kernels", "csrc", "bench", "tests")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".cpp", ".h") and not any(p.is_symlink() for p in path.parents) and path != Path(__file__)
)


def identifiers(path: Path) -> set[str]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        return {token.string for token in tokens if token.type == tokenize.NAME}
    return set(re.findall(r"[A-Za-z_]\w*", re.sub(r'//.*|/\*[\s\S]*?\*/|"[^"\n]*"', "", text)))


@pytest.mark.parametrize("folder", ["metarec_fast", "kernels", "csrc", "bench", "tests"])
def test_names_are_made_of_the_words_of_the_field(folder):
    own = [
        f"{path.relative_to(ROOT)}: {name}: say {OWN_WORDS[word.lower()]}"
        for path in CODE
        if path.relative_to(ROOT).parts[0] == folder
        for name in (*identifiers(path), path.stem)
        for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)
        if word.lower() in OWN_WORDS and name not in ELSEWHERE and "noise_floor" not in name
    ]
    assert not own, "\n".join(sorted(own))
