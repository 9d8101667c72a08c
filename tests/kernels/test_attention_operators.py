"""Attention's operators as torch sees them: traced, compiled, exported, under autocast, and where gradients end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.attention import attention
from kernels.attention_options import RelativeBias
from tests.kernels.conftest import DEVICE

pytest.importorskip("triton")
from kernels.gpu import attention as gpu

COMPILERS = ("eager", "aot_eager", "inductor")


def make(seqlen: int = 20, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k, v and a table of a relative bias."""
    torch.manual_seed(0)
    inputs = [torch.randn(2, seqlen, heads, 16, dtype=dtype) for heads in (4, 2, 2)]
    return [x.to(DEVICE).requires_grad_() for x in (*inputs, torch.randn(8, 4))]


def attend(q: Tensor, k: Tensor, v: Tensor, table: Tensor, **options: Any) -> Tensor:
    bias = RelativeBias(table, 12, bidirectional=False)
    out = attention(q, k, v, causal=True, relative_bias=bias, backend="triton", **options)
    assert isinstance(out, Tensor)
    return out


def results(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    out = function(*inputs)
    torch.manual_seed(1)
    return [out.detach(), *torch.autograd.grad(out, inputs, torch.randn(out.shape).to(out))]


def call(**options: Any) -> gpu.Call:
    empty = dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k", "key_lengths", "slopes", "table", "bias", "seed"))
    numbers = {"max_seqlen_q": 20, "max_seqlen_k": 20, "causal": False, "scale": 0.25, "window": None, "softcap": 0.0}
    return gpu.Call(**(empty | numbers | {"dropout_p": 0.0} | options))


@pytest.mark.parametrize("kind", ["plain", "everything", "packed"])
def test_operators_pass_torchs_own_checks(kind: str) -> None:
    q, k, v, _ = (x.detach() for x in make())
    table, bias = torch.randn(4, 25, device=DEVICE), torch.randn(1, 4, 20, 20, device=DEVICE)
    options = {"plain": call(), "everything": call(
        key_lengths=torch.tensor([20, 7], dtype=torch.int32, device=DEVICE), slopes=torch.rand(4, device=DEVICE),
        table=table, bias=bias,
        seed=torch.ones(1, dtype=torch.int64, device=DEVICE), causal=True, window=9, softcap=3.0, dropout_p=0.2,
    )}.get(kind)  # fmt: skip
    if options is None:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        bounds = torch.tensor([0, 15, 40], dtype=torch.int32, device=DEVICE)
        options = call(cu_seqlens_q=bounds, cu_seqlens_k=bounds, max_seqlen_q=25, max_seqlen_k=25)
    torch.library.opcheck(gpu.attention_forward, (q, k, v, *options))
    out, lse = gpu.attention_forward(q, k, v, *options)
    wants = (options.table is not None, options.bias is not None)
    arguments = (torch.randn_like(out), torch.randn_like(lse), q, k, v, out, lse, *options, True, *wants)
    torch.library.opcheck(gpu.attention_backward, arguments)


@pytest.mark.filterwarnings("ignore")  # torch.compile's own
@pytest.mark.parametrize("compiler", COMPILERS)
def test_compiles_in_one_graph_whatever_the_length(compiler: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: 2 * attend(*x), fullgraph=True, backend=compiler)
    for seqlen in (20, 33, 40):  # the second makes the length a symbol
        actual, expected = (results(f, make(seqlen)) for f in (compiled, lambda *x: 2 * attend(*x)))
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_dropout_compiles() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: attend(*x, dropout_p=0.5), fullgraph=True, backend="aot_eager")
    inputs = make()
    first, second = (results(compiled, inputs) for _ in range(2))
    assert not torch.equal(first[0], second[0])
    assert all(x.isfinite().all() for x in first)


@pytest.mark.parametrize("trained", [False, True])
def test_exports(trained: bool) -> None:
    class Module(torch.nn.Module):
        def __init__(self, table: Tensor) -> None:
            super().__init__()
            self.table = torch.nn.Parameter(table.detach(), requires_grad=trained)

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend(q, k, v, self.table)

    *inputs, table = make()
    detached = tuple(x.detach() for x in inputs)
    program = torch.export.export(Module(table), detached)
    assert "tandem.attention_forward" in program.graph_module.code
    torch.testing.assert_close(program.module()(*detached), attend(*detached, table))


def test_autocast_chooses_the_dtype() -> None:
    q, k, v, table = make()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out = attend(q, k.bfloat16(), v.half(), table)
    assert out.dtype == torch.bfloat16
    grads = torch.autograd.grad(out.float().sum(), (q, table))
    assert [x.dtype for x in grads] == [torch.float32, torch.float32]


def test_gradients_of_any_stride() -> None:
    inputs = make()
    out = attend(*inputs)
    dense = torch.randn_like(out)
    for strange in (torch.ones((), device=DEVICE).expand_as(out), dense.transpose(1, 3).contiguous().transpose(1, 3)):
        actual = torch.autograd.grad(out, inputs, strange, retain_graph=True)
        expected = torch.autograd.grad(out, inputs, strange.contiguous(), retain_graph=True)
        assert all(map(torch.equal, actual, expected))


def test_only_what_needs_a_gradient_gets_one() -> None:
    q, k, v, table = make()
    assert not attend(*(x.detach() for x in (q, k, v, table))).requires_grad
    (only,) = torch.autograd.grad(attend(q.detach(), k.detach(), v.detach(), table).sum(), table)
    expected = torch.autograd.grad(attend(q, k, v, table).sum(), table)
    torch.testing.assert_close(only, *expected)


def test_a_second_derivative_is_refused() -> None:
    q, k, v, table = make()
    with pytest.raises(RuntimeError, match="attention has no second derivative on triton"):
        torch.autograd.grad(attend(q, k, v, table).sum(), q, create_graph=True)


def test_activation_checkpointing_drops_the_same_weights() -> None:
    inputs = make()
    expected = []
    for checkpointed in (False, True):
        torch.manual_seed(5)
        function = lambda *x: attend(*x, dropout_p=0.4)  # noqa: E731
        if checkpointed:
            out = torch.utils.checkpoint.checkpoint(function, *inputs, use_reentrant=False)
        else:
            out = function(*inputs)
        expected.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    assert all(map(torch.equal, *expected))
