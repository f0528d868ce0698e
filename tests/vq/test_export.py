"""Eval modules as programs that run without metarec_fast: torch.jit.trace, torch.export, ONNX by both exporters."""

import copy
import io
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from metarec_fast import reference
from metarec_fast.models.sasrec import SASRecEncoder
from metarec_fast.ops import nearest_codeword
from metarec_fast.ops.portable_lookup import portable_nearest
from metarec_fast.vq import FastGroupedResidualVQ, FastResidualVQ, FastVQ
from tests.examples import representative
from tests.ops.test_nearest_codeword import DATA

DIM, CODES = 8, 16
MASK = torch.rand(3, 5, generator=torch.Generator().manual_seed(0)) > 0.3
TARGETS = torch.randint(CODES, (3, 5), generator=torch.Generator().manual_seed(0))


class Decoder(nn.Module):
    def __init__(self, quantizer):
        super().__init__()
        self.quantizer = quantizer

    def forward(self, indices):
        return self.quantizer.get_output_from_indices(indices)


class Autoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Conv2d(3, DIM, 2, 2), nn.ConvTranspose2d(DIM, 3, 2, 2)
        self.quantizer = residual(accept_image_fmap=True)

    def forward(self, image):
        quantized, indices, _ = self.quantizer(self.encoder(image))
        return self.decoder(quantized), indices


class Called(nn.Module):
    """A module called with keywords, as a function of tensors."""

    def __init__(self, module, keywords):
        super().__init__()
        self.module, self.names = module, [k for k, v in keywords.items() if isinstance(v, torch.Tensor)]
        self.options = {k: v for k, v in keywords.items() if k not in self.names}

    def forward(self, x, *tensors):
        return self.module(x, **dict(zip(self.names, tensors, strict=True)), **self.options)


def residual(**options):
    return FastResidualVQ(dim=DIM, **{"codebook_size": CODES, "num_quantizers": 3} | options)


def grouped(**options):
    return FastGroupedResidualVQ(dim=DIM, groups=2, codebook_size=CODES, num_quantizers=2, **options)


def trained_affine():
    vq = FastVQ(DIM, CODES, affine_param=True)
    for _ in range(2):
        vq(torch.randn(4, 20, DIM))
    return vq


X = (3, 5, DIM)
CASES = {
    "plain": (lambda: FastVQ(DIM, CODES), X, {}),
    "rows": (lambda: FastVQ(DIM, CODES), (3, DIM), {}),
    "projection": (lambda: FastVQ(DIM, CODES, codebook_dim=4, layernorm_after_project_in=True), X, {}),
    "heads": (lambda: FastVQ(DIM, CODES, heads=2, codebook_dim=4), X, {}),
    "separate_heads": (lambda: FastVQ(DIM, CODES, heads=2, codebook_dim=3, separate_codebook_per_head=True), X, {}),
    "cosine": (lambda: FastVQ(DIM, CODES, use_cosine_sim=True), X, {}),
    "cosine_orthogonal": (lambda: FastVQ(DIM, CODES, use_cosine_sim=True, orthogonal_reg_weight=1.0), X, {}),
    "image": (lambda: FastVQ(DIM, CODES, accept_image_fmap=True), (3, DIM, 4, 6), {}),
    "volume": (lambda: FastVQ(DIM, CODES, accept_3d_fmap=True, heads=2), (3, DIM, 4, 3, 2), {}),
    "channels_second": (lambda: FastVQ(DIM, CODES, channel_last=False), (3, DIM, 5), {}),
    "mask": (lambda: FastVQ(DIM, CODES, heads=2), X, {"mask": MASK}),
    "lens": (lambda: FastVQ(DIM, CODES, return_zeros_for_masked_padding=False), X, {"lens": torch.tensor([2, 5, 3])}),
    "learnable": (lambda: FastVQ(DIM, CODES, learnable_codebook=True, ema_update=False), X, {}),
    "bridge": (lambda: FastVQ(DIM, CODES, vq_bridge=nn.Linear(DIM, DIM)), X, {}),
    "affine": (trained_affine, X, {}),
    "topk": (lambda: FastVQ(DIM, CODES, use_cosine_sim=True), X, {"topk": 3}),
    "cross_entropy": (lambda: FastVQ(DIM, CODES), X, {"indices": TARGETS}),
    "breakdown": (lambda: FastVQ(DIM, CODES, rotation_trick=False), X, {"return_loss_breakdown": True}),
    "half": (lambda: FastVQ(DIM, CODES, codebook_dim=4).half(), X, {}),
    "double": (lambda: FastVQ(DIM, CODES).double(), X, {}),
    "residual": (residual, X, {"return_all_codes": True}),
    "residual_mask": (residual, X, {"mask": MASK}),
    "residual_projection": (lambda: residual(codebook_size=(16, 12), num_quantizers=2, codebook_dim=4), X, {}),
    "residual_cosine": (lambda: residual(use_cosine_sim=True, shared_codebook=True), X, {}),
    "residual_beams": (lambda: residual(beam_size=2), X, {}),
    "residual_neural": (lambda: residual(implicit_neural_codebook=True), X, {}),
    "grouped": (grouped, X, {}),
    "grouped_image": (lambda: grouped(accept_image_fmap=True, quantize_dropout=True), (3, DIM, 4, 6), {}),
    "autoencoder": (Autoencoder, (3, 3, 8, 8), {}),
}  # fmt: skip


def build(name):
    """The module, its arguments, and arguments of another number of items."""
    make, shape, keywords = CASES[name]
    module = Called(make(), keywords).eval()
    dtype = {"half": torch.float16, "double": torch.float64}.get(name, torch.float32)
    args = (torch.randn(shape, dtype=dtype), *(v for v in keywords.values() if isinstance(v, torch.Tensor)))
    return module, args, [tuple(torch.cat((a, a.flip(0)[:2], a)) for a in args), tuple(a[:1] for a in args)]


def check(module, program, *calls):
    for args in calls:
        expected = copy.deepcopy(module)(*args)  # affine codes follow what they see, in eval too
        torch.testing.assert_close(tree_leaves(program(*args)), tree_leaves(expected))


def dynamic(args):
    items = {0: torch.export.Dim("items", min=1)}
    return (items, (items,) * (len(args) - 1)) if len(args) > 1 else (items,)


def traced(module, args):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # shape checks, once more as branches
        return torch.jit.trace(module, args, check_trace=False)


@pytest.mark.parametrize("name", CASES)
def test_trace(name):
    module, args, others = build(name)
    state = {k: v.clone() for k, v in module.state_dict().items()}
    stored = io.BytesIO()
    torch.jit.save(traced(module, args), stored)
    torch.testing.assert_close(dict(module.state_dict()), state)
    stored.seek(0)
    program = torch.jit.load(stored)
    assert "metarec_fast::" not in str(program.inlined_graph)
    check(module, program, args, *others)


# one for each kind of node: a graph of torch.export takes a second
EXPORTED = ("separate_heads", "mask", "affine", "topk", "cross_entropy", "residual_projection", "residual_beams")


@pytest.mark.parametrize("name", representative(EXPORTED, ["mask", "topk", "residual_projection"]))
def test_export(name):
    module, args, others = build(name)
    program = torch.export.export(module, args, dynamic_shapes=dynamic(args))
    assert "metarec_fast." not in program.graph_module.code
    stored = io.BytesIO()
    torch.export.save(program, stored)
    stored.seek(0)
    check(module, torch.export.load(stored).module(), args, *others)


@pytest.mark.parametrize("name", ["heads", "channels_second"])
def test_export_by_dynamo(name):
    module, args, others = build(name)
    program = torch.export.export(module, args, dynamic_shapes=dynamic(args), strict=True)
    assert "metarec_fast." not in program.graph_module.code
    check(module, program.module(), args, *others)


def test_training_says_what_to_do():
    x = torch.randn(X)
    for module in (FastVQ(DIM, CODES), residual(), grouped(), nn.Sequential(nn.Linear(DIM, DIM), FastVQ(DIM, CODES))):
        for record in (traced, torch.export.export):
            with pytest.raises(RuntimeError, match=r"(FastVQ|FastResidualVQ) cannot be traced .* model.eval\(\) first"):
                record(module, (x,))


def test_codes_that_kmeans_has_not_started_say_so():
    vq, x = FastVQ(DIM, CODES, kmeans_init=True), torch.randn(4, 30, DIM)
    with pytest.raises(RuntimeError, match="k-means has not initialised yet cannot be traced or exported"):
        traced(vq.eval(), (x,))
    vq.train()(x)
    check(vq.eval(), traced(vq, (x,)), (x,))


def test_an_attention_encoder_is_traced_for_segments_of_any_length():
    encoder = SASRecEncoder(DIM, layers=1, heads=2, dropout=0.0, max_length=16).eval()
    program = traced(encoder, (torch.randn(5, DIM), torch.tensor([0, 3, 5])))
    assert "metarec_fast::" not in str(program.inlined_graph)
    check(encoder, program, (torch.randn(12, DIM), torch.tensor([0, 11, 12])))


# -- the lookup in torch's own operators


@pytest.mark.parametrize("shape", [(7, 5, 3), (100, 256, 8), (33, 31, 17), (97, 1, 33), (0, 4, 3)], ids=str)
@pytest.mark.parametrize("data", DATA)
def test_portable_lookup_equals_reference(data, shape):
    x, codes = (t.unsqueeze(0) for t in DATA[data](*shape))
    assert torch.equal(portable_nearest(x, codes), reference.nearest_codeword(x, codes)[0])
    both = torch.cat((x, x.flip(1))), torch.cat((codes, codes.flip(1)))
    assert torch.equal(portable_nearest(*both), reference.nearest_codeword(*both)[0])
    double = x.double() * (1 + 2.0**-40), codes.double()
    assert torch.equal(portable_nearest(*double), reference.nearest_codeword(*double)[0])


def largest_product(x, codes):
    """The lowest code of largest product, summed in float64 in ascending order; what is not finite never is."""
    total = torch.zeros(x.shape[0], codes.shape[0], dtype=torch.float64)
    for d in range(x.shape[1]):
        total = total + x[:, d, None].double() * codes[None, :, d].double()
    return torch.where(total.abs() < torch.inf, total, -torch.inf).argmax(-1)


@pytest.mark.parametrize("shape", [(7, 5, 3), (100, 256, 8), (33, 31, 17), (97, 1, 33), (0, 4, 3)], ids=str)
@pytest.mark.parametrize("data", DATA)
def test_portable_largest_product(data, shape):
    x, codes = DATA[data](*shape)
    assert torch.equal(portable_nearest(x[None], codes[None], metric="product")[0], largest_product(x, codes))
    codes[::3] = 0
    assert torch.equal(portable_nearest(x[None], codes[None], metric="product")[0], largest_product(x, codes))


def test_public_lookup_is_traced_too():
    codes = torch.randn(CODES, DIM)
    program = traced(lambda x: nearest_codeword(x, codes, with_margin=False).indices, (torch.randn(3, DIM),))
    x = torch.randn(50, DIM)
    assert torch.equal(program(x), nearest_codeword(x, codes).indices)


LOADED = """
import sys
sys.modules["metarec_fast"] = None  # whoever imports it fails
import torch
args, expected = torch.load("values.pt")
for program in (torch.jit.load("traced.pt"), torch.export.load("exported.pt2").module()):
    for a, e in zip(args, expected, strict=True):
        torch.testing.assert_close(torch.utils._pytree.tree_leaves(program(*a)), e)
"""


def test_programs_run_in_a_process_without_the_package(tmp_path):
    module, args, others = build("autoencoder")
    torch.jit.save(traced(module, args), tmp_path / "traced.pt")
    torch.export.save(torch.export.export(module, args, dynamic_shapes=dynamic(args)), tmp_path / "exported.pt2")
    torch.save(([args, *others], [tree_leaves(module(*a)) for a in (args, *others)]), tmp_path / "values.pt")
    done = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr


# -- ONNX


@pytest.fixture
def onnxruntime():
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name, reason=f"{name} is not installed (the extra [test] brings it)")
    return pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (the extra [test] brings it)")


class Session:
    """A model of ONNX as a function of tensors."""

    def __init__(self, onnxruntime, model):
        self.session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])

    def __call__(self, *args):
        names = [i.name for i in self.session.get_inputs()]
        feed = {name: a.numpy() for name, a in zip(names, args, strict=True)}
        return [torch.from_numpy(np.asarray(o)) for o in self.session.run(None, feed)]


def to_onnx(module, args, path, *, dynamo):
    names = [f"input_{i}" for i in range(len(args))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the older exporter is deprecated, and shapes are checked as it traces
        if dynamo:
            options = {"dynamic_shapes": dynamic(args), "verbose": False, "external_data": False}
        else:
            options = {"dynamic_axes": {name: {0: "items"} for name in names}}
        torch.onnx.export(module, args, path, dynamo=dynamo, opset_version=18, input_names=names, **options)
    return path


@pytest.mark.parametrize("name", CASES)
def test_onnx_by_trace(name, onnxruntime, tmp_path):
    module, args, others = build(name)
    check(module, Session(onnxruntime, to_onnx(module, args, tmp_path / "model.onnx", dynamo=False)), args, *others)


@pytest.mark.parametrize(
    "name",
    representative(["separate_heads", "mask", "topk", "residual_cosine", "autoencoder"], ["mask", "residual_cosine"]),
)
def test_onnx_by_export(name, onnxruntime, tmp_path):
    module, args, others = build(name)
    check(module, Session(onnxruntime, to_onnx(module, args, tmp_path / "model.onnx", dynamo=True)), args, *others)


@pytest.mark.parametrize("dynamo", [False, True])
def test_onnx_indices_are_exact(dynamo, onnxruntime, tmp_path, everything):
    """Ties, duplicates, offsets, extreme and non-finite values: the lowest nearest code, as everywhere."""
    by_dynamo = ("gaussian", "lattice", "not_finite") if everything else ("lattice", "not_finite")
    for number, data in enumerate(by_dynamo if dynamo else DATA):
        x, codes = DATA[data](50, 40, DIM)
        vq = FastVQ(DIM, 40).eval()
        vq.codebook = codes
        run = Session(onnxruntime, to_onnx(vq, (x,), tmp_path / f"{number}.onnx", dynamo=dynamo))
        rows = torch.cat((x, torch.randn(9, DIM)))
        assert torch.equal(run(rows)[1], reference.nearest_codeword(rows, codes)[0]), data
