"""
Matrix products on a CPU, each by what is fast at it.

torch multiplies by Intel's MKL. For a product with a single row, a single column or a single term in each sum that is
more trouble than work: in a compiled program such a one becomes elementwise operations and a sum, fused with what
stands around it, and so does the bias of a layer, which is otherwise copied into the result beforehand.

MKL leaves the 512-bit units of other makers' processors idle. Where those are twice as fast, oneDNN, which comes with
torch as well, takes the large products.
"""

import platform
import re
from functools import cache
from pathlib import Path
from typing import Any

import torch as th
from torch import fx

#: Products of fewer multiplications stay torch's: oneDNN would have more to set up. Those of a batch run one by one.
FEWEST, FEWEST_IN_BATCH = 1_200_000, 3_000_000
#: AMD's processors from this family on (Zen 5) have 512-bit units; those before work such instructions off in halves.
FAMILY_512 = 26

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
    """Whether oneDNN is the faster one at large products on this machine's processor."""
    if not th.backends.mkldnn.is_available() or th.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    return has_wide_units(processor())


@cache
def processor() -> str:
    """What Linux or Windows tells of this machine's first processor."""
    told = Path("/proc/cpuinfo")
    return told.read_text().split("\n\n")[0] if told.exists() else platform.processor()


def has_wide_units(processor: str) -> bool:
    """Whether a processor, as Linux or Windows tells of it, is AMD's and works on 512 bits at once."""
    family = re.search(r"family\s*:?\s*(\d+)", processor, re.IGNORECASE)
    return "AuthenticAMD" in processor and family is not None and int(family[1]) >= FAMILY_512


def _suits(a: th.Tensor, b: th.Tensor) -> bool:
    if not outruns_torch() or a.device.type != "cpu" or not a.dtype == b.dtype == th.float32:
        return False
    return a.shape[-2] * a.shape[-1] * b.shape[-1] >= (FEWEST if a.dim() == 2 else FEWEST_IN_BATCH)


def linear(x: th.Tensor, weight: th.Tensor, bias: th.Tensor) -> th.Tensor:
    """x weight + bias without gradients: (n, i), (i, m), (m,) -> (n, m)."""
    # A program that is being compiled gets its products from faster_products.
    ours = _suits(x, weight) and not th.compiler.is_compiling()
    return _product(x, weight, bias) if ours else th.addmm(bias, x, weight)


# -- in compiled programs --

aten = th.ops.aten
PRODUCTS = (aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default)


def _replace(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        if node.target not in PRODUCTS or node.kwargs or node.meta["val"].device.type != "cpu":
            continue
        *bias, a, b = node.args
        last = node
        with graph.inserting_before(node):
            if bias and bias[0].meta["val"].dim() == 1 and _suits(a.meta["val"], b.meta["val"]):
                # A layer is one product: with its bias, and with the ReLU that alone looks at it.
                (first, *others) = node.users
                relu = not others and first.target is aten.relu.default
                last = first if relu else node
                new = _call(th.ops.sb3_mismatch.product.default, a, b, *bias, relu)
            else:
                new = _plain(a, b)
                if bias:
                    new = _call(aten.add.Tensor, new, *bias)
        last.replace_all_uses_with(new)
        graph.erase_node(last)
        if last is not node:
            graph.erase_node(node)


def _plain(a: fx.Node, b: fx.Node) -> fx.Node:
    """a b: (..., n, k), (..., k, m) -> (..., n, m)."""
    (n, k), m = a.meta["val"].shape[-2:], b.meta["val"].shape[-1]
    if k == 1:
        return _call(aten.mul.Tensor, a, b)
    if m == 1:
        return _call(aten.sum.dim_IntList, _call(aten.mul.Tensor, a, _transposed(b)), [-1], True)
    if n == 1:
        return _call(aten.sum.dim_IntList, _call(aten.mul.Tensor, _transposed(a), b), [-2], True)
    if _suits(a.meta["val"], b.meta["val"]):
        return _call(th.ops.sb3_mismatch.product.default, a, b)
    product = aten.mm.default if a.meta["val"].dim() == 2 else aten.bmm.default
    if m < n and a.meta["val"].stride(-2) == 1:
        # Of a layer with few inputs, the gradient of the weights: MKL is quicker at few rows than at few columns.
        return _transposed(_call(product, _transposed(b), _transposed(a)))
    return _call(product, a, b)


def _transposed(x: fx.Node) -> fx.Node:
    return _call(aten.permute.default, x, [1, 0] if x.meta["val"].dim() == 2 else [0, 2, 1])


def _call(target: Any, *args: Any) -> fx.Node:
    """A new node, and what its result will be like."""
    node = next(x for x in args if isinstance(x, fx.Node)).graph.call_function(target, args)
    node.meta["val"] = target(*(x.meta["val"] if isinstance(x, fx.Node) else x for x in args))
    return node


def faster_products() -> Any:
    """What gives a compiled program its products, forward and backward: a pass over its graph."""
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
