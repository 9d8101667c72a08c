"""Which backend is picked: by argument, by the process's choice, by default."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from kernels import backend
from kernels.backend import available, choose, triton_serves
from tests.conftest import tiny_model

CPU = torch.device("cpu")
WITHOUT_NATIVE = ("triton", "torch", "reference")


@pytest.fixture
def process_choice(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """To set what TANDEM_BACKEND said when the process began."""
    monkeypatch.setattr(backend, "PROCESS_CHOICE", "auto")
    return monkeypatch


def test_the_first_of_those_available_is_the_default(process_choice: pytest.MonkeyPatch) -> None:
    assert choose("op", available(CPU, native=True)) == "native"
    assert choose("op", available(CPU)) == "torch"
    assert choose("op", available(CPU), "auto") == "torch"


@pytest.mark.parametrize("requested", ["native", "torch"])
def test_an_argument_wins_over_the_process(requested: str, process_choice: pytest.MonkeyPatch) -> None:
    process_choice.setattr(backend, "PROCESS_CHOICE", "reference")
    names = available(CPU, native=True)
    assert choose("op", names) == "reference"
    assert choose("op", names, requested) == requested


def test_what_is_asked_for_and_missing_is_an_error(process_choice: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="op has no native backend here: choose one of torch, reference or auto"):
        choose("op", available(CPU), "native", has=WITHOUT_NATIVE)
    process_choice.setattr(backend, "PROCESS_CHOICE", "native")
    with pytest.raises(ValueError, match="op has no native backend here"):
        choose("op", available(CPU))
    process_choice.setattr(backend, "PROCESS_CHOICE", "cuda")
    with pytest.raises(ValueError, match="unknown backend 'cuda'"):
        choose("op", available(CPU), has=WITHOUT_NATIVE)


def test_the_process_passes_over_an_operation_that_never_has_its_choice(process_choice: pytest.MonkeyPatch) -> None:
    process_choice.setattr(backend, "PROCESS_CHOICE", "native")
    assert choose("op", available(CPU), has=WITHOUT_NATIVE) == "torch"


def test_the_environment_speaks_when_the_process_begins() -> None:
    code = "from kernels.backend import choose; print(choose('op', ('native', 'torch', 'reference')))"
    environment = {**os.environ, backend.ENVIRONMENT_VARIABLE: "reference"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "reference", done.stderr


@pytest.mark.parametrize("name", ["native", "torch", "reference"])
@pytest.mark.parametrize("architecture", ["encoder_decoder", "decoder_only"])
def test_a_model_trains_on_a_cpu_whatever_the_process_chose(
    architecture: str, name: str, process_choice: pytest.MonkeyPatch
) -> None:
    model = tiny_model(architecture, activation="swiglu" if architecture == "decoder_only" else "gelu")
    inputs = [torch.arange(4, 24).view(2, 10)] * (2 if architecture == "encoder_decoder" else 1)
    expected = model(*inputs)
    process_choice.setattr(backend, "PROCESS_CHOICE", name)
    out = model(*inputs)
    out.sum().backward()
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(backend.TRITON_DEVICE != "cpu", reason="interpreted kernels only")
def test_triton_comes_last_where_it_is_interpreted_and_takes_three_dtypes() -> None:
    assert available(CPU, triton=True) == ("torch", "reference", "triton")
    assert available(CPU, triton=True, native=True) == ("native", "torch", "reference", "triton")
    x = torch.zeros(2)
    assert triton_serves(x, None, x.half(), x.bfloat16())
    assert not triton_serves(x, x.double())
    assert not triton_serves(x.to("meta"))


@pytest.mark.skipif(backend.TRITON_DEVICE != "cpu", reason="interpreted kernels only")
@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("decoder_only", {"norm_place": "sandwich", "activation": "swiglu"}),
        ("encoder_decoder", {"norm_place": "post", "norm": "layernorm", "activation": "geglu", "encoder_depth": 1}),
    ],
)
def test_a_model_trains_on_triton_alone(
    architecture: str, options: dict[str, object], process_choice: pytest.MonkeyPatch
) -> None:
    model = tiny_model(architecture, depth=1, **options)
    inputs = [torch.arange(4, 10).view(2, 3)] * (2 if architecture == "encoder_decoder" else 1)
    results = []
    for name in ("torch", "triton"):
        process_choice.setattr(backend, "PROCESS_CHOICE", name)
        out = model(*inputs)
        results.append([out, *torch.autograd.grad(out.sin().sum(), list(model.parameters()))])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("choice", ["nonsense", " torch"])
def test_a_choice_that_is_no_backend_is_one_sentence(choice: str, process_choice: pytest.MonkeyPatch) -> None:
    process_choice.setattr(backend, "PROCESS_CHOICE", choice)
    with pytest.raises(ValueError, match=r"TANDEM_BACKEND is '.*': choose one of triton, native"):
        backend.check_process_choice()


def test_triton_for_a_process_that_cannot_run_it_is_one_sentence(process_choice: pytest.MonkeyPatch) -> None:
    process_choice.setattr(backend, "PROCESS_CHOICE", "triton")
    process_choice.setattr(backend, "TRITON_DEVICE", None)
    with pytest.raises(ValueError, match="needs a GPU"):
        backend.check_process_choice()


def test_the_path_of_the_cpu_is_logged_once() -> None:
    script = "import logging; logging.basicConfig(level='INFO'); import kernels.extension; import kernels.linear"
    env = {**os.environ, "TANDEM_CPU": "generic"}
    result = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    assert result.stderr.count("INFO:kernels.extension:the C++ core uses generic") == 1
