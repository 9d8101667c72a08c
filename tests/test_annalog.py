"""The worked example of docs/families.md: ANNalog, loaded as a family, is the model its package runs."""

from __future__ import annotations

import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import models
from engine import LLM, SamplingParams
from examples import annalog_family
from models.transformer import EncoderDecoder

ROOT = Path(__file__).parent.parent
MOLECULES = [
    "CC(=O)Oc1ccccc1C(=O)O",
    "C",
    "CN1C=NC2=C1C(=O)N(C(=O)N2C)C",
    "C[C@H](N)C(=O)O",
    "O=C(O)c1cc(Br)ccc1[N+](=O)[O-]",
    "Clc1ccc(cc1)C(c1ccccc1)N1CCN(CC1)CCOCC(=O)O",
]
PAD, START, END = 1, 2, 3

pytestmark = pytest.mark.skipif(
    find_spec("annalog") is None, reason="needs the annalog package: pip install --no-deps annalog==1.0.6"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("annalog")
    annalog_family.convert(folder)
    return folder


@pytest.fixture(scope="module")
def package() -> ModuleType:
    """The package's model code alone: all of it needs rdkit."""
    spec = find_spec("annalog")
    assert spec is not None and spec.submodule_search_locations
    code = Path(spec.submodule_search_locations[0]) / "model_files"
    found = spec_from_file_location("annalog_model_files", code / "__init__.py", submodule_search_locations=[str(code)])
    assert found is not None and found.loader is not None
    module = sys.modules[found.name] = module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def theirs(package: ModuleType) -> Any:
    """Their module as their handler builds it."""
    code, device = package.seq2seq_attention, torch.device("cpu")
    encoder = code.Encoder(59, 256, 3, 8, 512, 0.1, device, 102)
    decoder = code.Decoder(59, 256, 3, 8, 512, 0.1, device, 102)
    model = code.Seq2Seq(encoder, decoder, PAD, PAD, device)
    checkpoint = Path(package.__path__[0]).parent / "ckpt_and_vocab" / "Lev_extended.pt"
    model.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True))
    return model.eval()


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(folder)


def padded(rows: list[list[int]]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=PAD)


def greedy(theirs: Any, source: list[int], most: int) -> list[int]:
    output = [START]
    with torch.inference_mode():
        while len(output) <= most and output[-1] != END:
            logits, _ = theirs(torch.tensor([source]), torch.tensor([output]))
            output.append(int(logits[0, -1].argmax()))
    return output[1:]


def test_sources_have_their_tokens(llm: LLM, package: ModuleType, folder: Path) -> None:
    assert llm.tokenizer is not None
    split = package.vocabulary.SMILESTokenizer().tokenize
    for molecule in [*MOLECULES, "C%10[Si]C%1", "BrClC[", "<eos>"]:
        ids = [llm.tokenizer.source.token_to_id(token) for token in split(molecule)]
        assert llm.tokenizer.encode(molecule) == [START, *(0 if i is None else i for i in ids), END]


def test_logits_are_those_of_the_package(folder: Path, theirs: Any) -> None:
    ours, tokenizer = models.load(folder)
    assert isinstance(ours, EncoderDecoder) and tokenizer is not None
    sources = [tokenizer.encode(molecule) for molecule in MOLECULES]
    target = padded([source[:-1] for source in reversed(sources)])
    with torch.inference_mode():
        got = ours(padded(sources), target, source_lengths=torch.tensor([len(source) for source in sources]))
        wanted, _ = theirs(padded(sources), target)
    real = target != PAD
    assert wanted[real].std() > 1
    torch.testing.assert_close(got[real], wanted[real], atol=1e-4, rtol=0)


def test_greedy_molecules_are_those_of_the_package(llm: LLM, theirs: Any) -> None:
    assert llm.tokenizer is not None
    outputs = llm.generate(MOLECULES[:4], SamplingParams(temperature=0, max_tokens=40), use_tqdm=False)
    for molecule, output in zip(MOLECULES[:4], outputs, strict=True):
        wanted = greedy(theirs, llm.tokenizer.encode(molecule), 40)
        assert output.outputs[0].token_ids == wanted
        assert output.outputs[0].text == llm.tokenizer.decode(wanted)
        assert output.outputs[0].text and " " not in output.outputs[0].text


def test_scores_are_their_log_likelihoods(llm: LLM, theirs: Any) -> None:
    assert llm.tokenizer is not None
    source, target = (llm.tokenizer.encode(molecule) for molecule in MOLECULES[:2])
    with torch.inference_mode():
        logits, _ = theirs(torch.tensor([source]), torch.tensor([target[:-1]]))
    wanted = logits[0].log_softmax(-1)[torch.arange(len(target) - 1), target[1:]].sum()
    score = llm.score([MOLECULES[0]], [MOLECULES[1]])[0]
    assert score.total == pytest.approx(float(wanted), abs=1e-3)
