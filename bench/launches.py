"""The work of an outer step on a GPU, counted without one, and proof that the host waits for none of it.

    python -m bench launches

The step runs on meta tensors, which have shapes but no values: whatever would look at one raises `HostWaits`, and so
does a copy between host and device. Operators that make no view and no empty tensor are counted; ours as what their
launchers launch, torch's operators and Triton kernels. One of torch's operators may launch several kernels (a sum of
many rows, the gradient of a gather), so there are at least as many launches. Sizes are those of bench_meta: 128 windows
of up to 50 positions a domain, here filled to 1,280 positions, 64 wide, two layers. Filling and copying the batches,
outside the graph, are counted too.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from metarec_fast.config import MetaConfig, ModelConfig
from metarec_fast.meta import FixedStep, OuterStep
from metarec_fast.models.recommender import Recommender
from metarec_fast.sampling.batch import BatchShape, PackedBatch

CATALOGUES = {"toys": 11924, "video_games": 10672, "health": 18534, "clothing": 23033, "beauty": 12101}
META = torch.device("meta")
SHAPE = BatchShape(windows=128, positions=1280, length=50)
LAUNCHERS = {  # of our operators, by module
    "linear_scan": {"linear_scan": "_cuda", "linear_scan_backward": "_backward_cuda"},
    "linear_cross_entropy.cuda": {
        "linear_cross_entropy": "forward",
        "linear_cross_entropy_backward": "backward",
        "linear_cross_entropy_double_backward": "double_backward",
        "linear_cross_entropy_sum": "weighted_sum",
    },
    "vq_commit": {"vq_commit": "_cuda"},
    "vq_backward": {"vq_backward": "_cuda"},
}
NO_KERNEL = ("_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh")
SIZED_BY_VALUES = ("_local_scalar_dense", "_unique2", "unique_dim", "unique_consecutive", "nonzero", "masked_select",
                   "bincount", "repeat_interleave", "is_nonzero", "equal")  # fmt: skip


class HostWaits(Exception):
    """The host would have to wait for the device."""


class Trace(TorchDispatchMode):
    """Counts what a GPU is given to do, by name, where tensors are on the device "meta"."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self._launchers = {
            name: getattr(import_module(f"metarec_fast.ops.{module}"), launcher)
            for module, launchers in LAUNCHERS.items()
            for name, launcher in launchers.items()
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func._schema.name.split("::")[1]
        if func.namespace == "metarec_fast":
            with self:
                return self._launchers[name](*args, **(kwargs or {}))
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        masks = name in ("index", "index_put", "index_put_") and any(x.dtype == torch.bool for x in inputs)
        if any(x.is_meta for x in inputs) and (name in SIZED_BY_VALUES or masks):
            raise HostWaits(f"{name} needs values")
        if name == "_to_copy" and any(x.is_meta for x in inputs) and (kwargs or {}).get("device", META) != META:
            raise HostWaits("the host wants values")
        outputs = func(*args, **(kwargs or {}))
        given = [x for x in (*inputs, *tree_leaves(outputs)) if isinstance(x, Tensor)]
        # a number on the host may take part in an operator, but not be copied
        devices = {x.device.type for x in given if x.dim() or name in ("_to_copy", "copy_")}
        if len(devices) > 1:
            raise HostWaits(f"{name} copies between devices")
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if "meta" in devices | {x.device.type for x in inputs} and not view and name not in NO_KERNEL:
            self.counts[name] += 1
        return outputs


@contextmanager
def traced() -> Iterator[Trace]:
    """Meta tensors take the way of CUDA tensors, kernels are counted in place of being launched."""
    from triton.runtime.jit import JITFunction

    trace = Trace()

    def launch(kernel: Any, *args: Any, **kwargs: Any) -> None:
        trace.counts[f"triton {kernel.fn.__module__.split('.')[-1]}.{kernel.fn.__name__}"] += 1

    with mock.patch.object(JITFunction, "run", launch), trace:
        patches = [
            mock.patch.object(import_module(f"metarec_fast.ops.{module}"), "choose_backend", lambda *_, **__: "triton")
            for module in ("linear_scan", "linear_cross_entropy.api", "vq_commit", "nearest_codeword")
        ]
        for patch in patches:
            patch.start()
        try:
            yield trace
        finally:
            for patch in patches:
                patch.stop()


def without_values(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.empty_like(p, device="meta") for name, p in parameters.items()}


def step(model: Recommender, config: MetaConfig, *, shape: BatchShape = SHAPE) -> Callable[[], OuterStep]:
    """An outer step on meta tensors; the last of the model's domains is the target."""
    *sources, target = model.domains
    batch = PackedBatch(*(torch.empty(n, dtype=torch.int64) for n in (shape.positions - 1,) * 2), *(
        torch.zeros(n, dtype=torch.int64) for n in (shape.windows + 1, shape.windows)
    )).to("meta")  # fmt: skip
    fixed = FixedStep(
        model.loss,
        without_values(model.shared_parameters()),
        {name: without_values(model.private_parameters(name)) for name in sources},
        without_values(model.private_parameters(target)),
        shapes=dict.fromkeys(sources, shape),
        target_shape=shape,
        config=config,
    )
    return lambda: fixed({name: [batch] * config.inner_steps for name in sources}, batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--names", action="store_true", help="the operators by name")
    args = parser.parse_args()
    print("operators of an outer step that are not views: 4 sources, K = 1 (see the module for what this leaves out)")
    for encoder in ("lru", "sasrec"):
        model = Recommender(ModelConfig(dropout=0.0, encoder=encoder), CATALOGUES)
        for target_pass in ("loop", "vmap"):
            for order in (1, 2):
                run = step(model, MetaConfig(similarity_decay=0.0, order=order, target_pass=target_pass))
                with traced() as trace:
                    run()
                    trace.counts.clear()  # the first step makes the buffers
                    run()
                case = f"{encoder:<7}order {order} target {target_pass:<5}"
                ours = sum(n for name, n in trace.counts.items() if name.startswith("triton"))
                print(f"{case}{trace.counts.total():>6}, {ours} of them Triton kernels")
                if args.names:
                    print("   ", ", ".join(f"{name} {n}" for name, n in trace.counts.most_common(40)))


if __name__ == "__main__":
    main()
