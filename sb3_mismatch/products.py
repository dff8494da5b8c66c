"""
Matrix products by oneDNN where torch's own are slow.

On a CPU torch multiplies matrices of single precision by Intel's MKL, which leaves the 512-bit units of other makers'
processors idle. oneDNN, which comes with torch as well, uses them.
"""

import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch as th
from torch import fx

#: Products of fewer multiplications stay torch's: oneDNN would have more to set up. Those of a batch run one by one.
FEWEST, FEWEST_IN_BATCH = 1_200_000, 3_000_000

_LIBRARY = th.library.Library("sb3_mismatch", "DEF")
_LIBRARY.define("product(Tensor a, Tensor b, Tensor? bias=None, bool relu=False) -> Tensor")


def _product(a: th.Tensor, b: th.Tensor, bias: th.Tensor | None = None, relu: bool = False) -> th.Tensor:
    if a.dim() == 3:
        return th.stack([_product(*each) for each in zip(a, b, strict=True)])
    out: th.Tensor = th.ops.mkldnn._linear_pointwise.default(a, b.t(), bias, "relu" if relu else "none", [], "")
    return out


_LIBRARY.impl("product", _product, "CPU")
th.library.register_fake(
    "sb3_mismatch::product",
    lambda a, b, bias=None, relu=False: a.new_empty(*a.shape[:-1], b.shape[-1]),
    lib=_LIBRARY,
)


@cache
def outruns_torch() -> bool:
    """Whether oneDNN is the faster one on this machine's processor."""
    if not th.backends.mkldnn.is_available() or th.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    told = Path("/proc/cpuinfo")
    return "AuthenticAMD" in (told.read_text() if told.exists() else platform.processor())


def _suits(a: th.Tensor, b: th.Tensor) -> bool:
    if not outruns_torch() or a.device.type != "cpu" or not a.dtype == b.dtype == th.float32:
        return False
    return a.shape[-2] * a.shape[-1] * b.shape[-1] >= (FEWEST if a.dim() == 2 else FEWEST_IN_BATCH)


def linear(x: th.Tensor, weight: th.Tensor, bias: th.Tensor) -> th.Tensor:
    """x weight + bias without gradients: (n, i), (i, m), (m,) -> (n, m)."""
    # A program that is being compiled gets its products from faster_products.
    ours = _suits(x, weight) and not th.compiler.is_compiling()
    return _product(x, weight, bias) if ours else th.addmm(bias, x, weight)


def _replace(graph: fx.Graph) -> None:
    aten, product = th.ops.aten, th.ops.sb3_mismatch.product.default
    for node in list(graph.nodes):
        if node.target not in (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default):
            continue
        *bias, a, b = node.args
        if node.kwargs or not _suits(a.meta["val"], b.meta["val"]):
            continue
        last = node
        with graph.inserting_before(node):
            if bias and bias[0].meta["val"].dim() == 1:
                # A layer is one product: with its bias, and with the ReLU that alone looks at it.
                (first, *others) = node.users
                relu = not others and first.target is aten.relu.default
                last = first if relu else node
                new = graph.call_function(product, (a, b, *bias, relu))
            else:
                new = graph.call_function(product, (a, b))
                new.meta.update(node.meta)
                if bias:
                    new = graph.call_function(aten.add.Tensor, (new, *bias))
            new.meta.update(node.meta)
        last.replace_all_uses_with(new)
        graph.erase_node(last)
        if last is not node:
            graph.erase_node(node)


def faster_products() -> Any:
    """What turns the products of a compiled program, forward and backward, into oneDNN's: a pass over its graph."""
    # torch's compiler takes seconds to import, and who runs plain never needs it.
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

    class FasterProducts(CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            _replace(graph)

        def uuid(self) -> bytes:
            # torch's cache of compiled programs knows the pass by this, and forgets by itself how many threads a
            # program was made for: that of a single thread is slow on two.
            return get_hash_for_files((__file__,), f"{outruns_torch()} {th.get_num_threads()}")

    return FasterProducts()
