"""Products that are computed in another way are torch's up to rounding, alone and in compiled programs."""

import re
import warnings
from collections.abc import Callable

import pytest
import torch as th
from torch.testing import assert_close

from sb3_mismatch import products

pytestmark = pytest.mark.skipif(not th.backends.mkldnn.is_available(), reason="torch has no oneDNN")


@pytest.fixture
def faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """On any processor."""
    monkeypatch.setattr(products, "outruns_torch", lambda: True)


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        ("vendor_id\t: AuthenticAMD\ncpu family\t: 26\nmodel\t\t: 2\n", True),
        ("vendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 17\n", False),
        ("vendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 143\n", False),
        ("vendor_id\t: GenuineIntel\ncpu family\t: 27\nmodel\t\t: 1\n", False),
        ("AMD64 Family 26 Model 68 Stepping 0, AuthenticAMD", True),
        ("arm", False),
    ],
)
def test_processors_with_wide_units(processor, expected):
    assert products.has_wide_units(processor) == expected


def test_a_processor_that_oneDNN_does_not_suit_keeps_torchs(monkeypatch):
    monkeypatch.setattr(products, "_product", None)
    monkeypatch.setattr(products, "outruns_torch", lambda: False)
    x, weight, bias = th.randn(128, 128), th.randn(128, 128), th.randn(128)
    assert products.linear(x, weight, bias).equal(th.addmm(bias, x, weight))


def test_linear(faster):
    x, weight, bias = th.randn(300, 100), th.randn(100, 60), th.randn(60)
    calls: list[str] = []
    product = products._product
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "_product", lambda *a: calls.append("oneDNN") or product(*a))
        assert_close(products.linear(x, weight, bias), th.addmm(bias, x, weight), rtol=1e-4, atol=1e-4)
        # Too small to be worth it.
        assert_close(products.linear(x[:10], weight, bias), th.addmm(bias, x[:10], weight))
    assert calls == ["oneDNN"]


def compiled(function: Callable[..., th.Tensor], *inputs: th.Tensor) -> tuple[th.Tensor, str]:
    """What a compiled function gives, and its program."""
    with warnings.catch_warnings():
        # torch warns of its own code.
        warnings.simplefilter("ignore")
        from torch._inductor.utils import run_and_get_code

        program = th.compile(
            function, dynamic=False, options={"post_grad_custom_post_pass": products.faster_products()}
        )
        result, (code, *_) = run_and_get_code(program, *inputs)
    return result, code


def test_a_compiled_program_and_its_gradients(faster):
    x, weight, bias, last = th.randn(256, 100), th.randn(100, 100), th.randn(100), th.randn(100, 100)

    def gradient(x: th.Tensor, weight: th.Tensor, bias: th.Tensor, last: th.Tensor) -> th.Tensor:
        def loss(weight: th.Tensor, last: th.Tensor) -> th.Tensor:
            return (th.tanh(th.addmm(bias, x, weight)) @ last).square().mean()

        return th.stack(th.func.grad(loss, argnums=(0, 1))(weight, last))

    with th.no_grad():
        result, code = compiled(gradient, x, weight, bias, last)
        assert_close(result, gradient(x, weight, bias, last), rtol=1e-4, atol=1e-4)
    # Two forward, one for the gradient of tanh's, two for those of the weights.
    assert code.count("torch.ops.sb3_mismatch.product.default(") == 5
    assert "extern_kernels.addmm" not in code


@pytest.fixture
def by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """On any processor."""
    monkeypatch.setattr(products, "outruns_torch", lambda: False)


@pytest.mark.parametrize(
    ("n", "k", "m"), [(32, 1, 16), (32, 16, 1), (1, 16, 32), (1, 1, 5), (1, 16, 1), (5, 1, 1)], ids=str
)
@pytest.mark.parametrize("each", [(), (3,)], ids=["one", "batch"])
def test_a_thin_product_is_no_product(by_torch, each, n, k, m):
    a, b = th.randn(*each, n, k), th.randn(*each, k, m)
    result, code = compiled(th.matmul, a, b)
    assert_close(result, a @ b)
    assert not re.search(r"extern_kernels\.\w+\(", code)
    # The gradients of a layer read their operands by columns.
    result, code = compiled(lambda a, b: a.mT @ b.mT, b, a)
    assert_close(result, b.mT @ a.mT)
    assert not re.search(r"extern_kernels\.\w+\(", code)


@pytest.mark.parametrize("each", [(), (3,)], ids=["one", "batch"])
def test_a_layer_and_its_gradients(by_torch, each):
    x, weight, bias = th.randn(*each, 64, 5), th.randn(*each, 32, 5), th.randn(*each, 1, 32)

    def gradient(x: th.Tensor, weight: th.Tensor, bias: th.Tensor) -> tuple[th.Tensor, ...]:
        layer = th.baddbmm if each else th.addmm
        return th.func.grad(lambda *args: th.relu(layer(args[2], args[0], args[1].mT)).sum(), argnums=(0, 1, 2))(
            x, weight, bias
        )

    with th.no_grad():
        result, code = compiled(gradient, x, weight, bias)
        assert_close(result, gradient(x, weight, bias))
    # The bias is added where ReLU is taken.
    product = "extern_kernels.bmm" if each else "extern_kernels.mm"
    assert code.count(f"{product}(") == 3
    assert "addbmm" not in code
    assert "addmm" not in code


@pytest.mark.parametrize("bias", [th.randn(120), th.randn(200, 120), th.randn(200, 1)])
def test_a_layer_is_one_product_where_its_bias_is_one(faster, bias):
    x, weight = th.randn(200, 100), th.randn(100, 120)

    def layer(bias: th.Tensor, x: th.Tensor, weight: th.Tensor) -> th.Tensor:
        return th.relu(th.addmm(bias, x, weight))

    result, code = compiled(layer, bias, x, weight)
    assert_close(result, layer(bias, x, weight), rtol=1e-4, atol=1e-4)
    assert code.count("torch.ops.sb3_mismatch.product.default(") == 1
    assert ("cpp_fused" in code) == (bias.dim() == 2)


def test_a_sum_that_others_look_at_too_is_kept(faster):
    bias, x, weight = th.randn(120), th.randn(200, 100), th.randn(100, 120)

    def both(bias: th.Tensor, x: th.Tensor, weight: th.Tensor) -> th.Tensor:
        total = th.addmm(bias, x, weight)
        return th.relu(total) - 2 * total

    result, code = compiled(both, bias, x, weight)
    assert_close(result, both(bias, x, weight), rtol=1e-4, atol=1e-4)
    assert code.count("torch.ops.sb3_mismatch.product.default(") == 1


def test_a_batch_in_a_compiled_program(faster):
    bias, a, b = th.randn(3, 1, 150), th.randn(3, 200, 110), th.randn(3, 110, 150)
    result, code = compiled(th.baddbmm, bias, a, b)
    assert_close(result, th.baddbmm(bias, a, b), rtol=1e-4, atol=1e-4)
    assert "torch.ops.sb3_mismatch.product.default(" in code
    small, code = compiled(th.bmm, a[:, :10], b)
    assert_close(small, th.bmm(a[:, :10], b))
    assert "sb3_mismatch" not in code


def test_programs_for_other_numbers_of_threads_are_other_programs():
    threads = th.get_num_threads()
    try:
        names = []
        for n in (1, 2):
            th.set_num_threads(n)
            names.append(products.faster_products().uuid())
    finally:
        th.set_num_threads(threads)
    assert len(set(names)) == 2
