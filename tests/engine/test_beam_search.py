"""Beams go where transformers' go: both search the same small random models."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from engine.beam_params import BeamSearchParams
from engine.beam_search import BeamSearch
from engine.beam_step import NoContinuation
from engine.kv_cache import Row
from engine.logits_rules import GenerationRules, RuleColumns
from engine.request import Request, Sequence
from engine.sampling import SamplingParams
from kernels.sampling import edit_logits, top_k

VOCAB, EOS, PAD, START = 97, 2, 0, 1
PROMPT, SOURCE = [START, 9, 14, 9, 14, 30], [11, 5, 40, 7, 2]
MAX_TOKENS = 12
TINY: dict[str, Any] = {"vocab_size": VOCAB, "pad_token_id": PAD, "bos_token_id": START, "eos_token_id": EOS}
SEQ2SEQ: dict[str, Any] = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 64, "decoder_start_token_id": START,
}  # fmt: skip
T5: dict[str, Any] = {"d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 2, "num_heads": 2}
KINDS = {
    "marian": lambda: transformers.MarianMTModel(transformers.MarianConfig(**TINY, **SEQ2SEQ)),
    "bart": lambda: transformers.BartForConditionalGeneration(transformers.BartConfig(**TINY, **SEQ2SEQ)),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(**TINY, **T5, decoder_start_token_id=START)
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**TINY, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    ),
}
MODELS: dict[str, Any] = {}


def model_of(kind: str) -> Any:
    """A model in float64, so that beams never tie, whose head likes to end: beams finish at different steps."""
    if kind not in MODELS:
        torch.manual_seed(5)
        model = KINDS[kind]().eval().double()
        model.lm_head = torch.nn.Linear(32, VOCAB, bias=True, dtype=torch.float64)
        torch.nn.init.normal_(model.lm_head.weight, std=2.8 if kind == "t5" else 0.5)  # T5 scales its hidden states
        model.lm_head.bias.data.zero_()[[EOS, 3, 4]] = torch.tensor([6.0, 4.0, 4.0], dtype=torch.float64)
        model.generation_config = transformers.GenerationConfig()  # generate would take what is not given from here
        MODELS[kind] = model
    return MODELS[kind]


@torch.no_grad()
def search(kind: str, params: BeamSearchParams, rules: GenerationRules, source: list[int] = SOURCE) -> BeamSearch:
    """Our search over the model's logits, all computed anew in each step."""
    model = model_of(kind)
    prompt = PROMPT if kind == "gpt2" else [START]
    assert params.max_tokens is not None
    beams = BeamSearch(params, prompt, len(prompt) + params.max_tokens, rules.eos_ids)
    while not beams.done:
        ids = torch.tensor(beams.token_ids)
        given = {} if kind == "gpt2" else {"decoder_input_ids": ids}
        inputs = ids if kind == "gpt2" else torch.tensor([source]).expand(len(ids), -1)
        log_probs = model(inputs, **given).logits[:, -1].float().log_softmax(-1)
        edit(log_probs, beams, rules)
        advance(beams, log_probs)
    return beams


def edit(log_probs: torch.Tensor, beams: BeamSearch, rules: GenerationRules) -> None:
    """What the rules ask of the running beams, as in the engine."""
    request = Request("", None, beams.token_ids[0][: beams.num_prompt], SamplingParams(), rules=rules)
    sequences = [
        Sequence(request, i, ids, 0, None, beams.max_length, row=Row(i, None)) for i, ids in enumerate(beams.token_ids)
    ]
    columns = RuleColumns(np.array(beams.token_ids, dtype=np.int32))
    edits = columns.edits(sequences, [beams.length] * len(sequences), VOCAB)
    if edits is not None:
        edit_logits(log_probs, edits)


def advance(beams: BeamSearch, log_probs: torch.Tensor) -> None:
    best, tokens = top_k(log_probs, min(beams.num_candidates, log_probs.shape[1]))
    beams.advance(best.numpy(), tokens.numpy())


def expected(kind: str, params: BeamSearchParams, rules: GenerationRules) -> tuple[list[list[int]], list[float] | None]:
    """transformers' hypotheses, from the first generated token to the end token, and their scores."""
    prompt = PROMPT if kind == "gpt2" else SOURCE
    config = transformers.GenerationConfig(
        num_beams=params.beam_width, max_new_tokens=params.max_tokens, num_return_sequences=params.num_returned,
        length_penalty=params.length_penalty, early_stopping=params.early_stopping,
        eos_token_id=list(rules.eos_ids) or None,
        pad_token_id=PAD, decoder_start_token_id=START, forced_bos_token_id=rules.forced_bos_id,
        forced_eos_token_id=rules.forced_eos_id, no_repeat_ngram_size=rules.no_repeat_ngram_size,
        suppress_tokens=list(rules.suppress_ids) or None, begin_suppress_tokens=list(rules.begin_suppress_ids) or None,
        bad_words_ids=[list(word) for word in rules.bad_words] or None, min_new_tokens=rules.min_new_tokens or None,
        return_dict_in_generate=True, output_scores=True, do_sample=False,
    )  # fmt: skip
    inputs = torch.tensor([prompt])
    found = model_of(kind).generate(inputs, attention_mask=torch.ones_like(inputs), generation_config=config)
    start = len(PROMPT) if kind == "gpt2" else 1
    rows = [_until_end(row, rules.eos_ids) for row in found.sequences[:, start:].tolist()]
    return rows, None if params.beam_width == 1 else found.sequences_scores.tolist()


def _until_end(row: list[int], eos_ids: tuple[int, ...]) -> list[int]:
    ends = [i for i, token in enumerate(row) if token in eos_ids]
    return row[: ends[0] + 1] if ends else row


def check(kind: str, rules: GenerationRules | None = None, **options: Any) -> BeamSearch:
    params = BeamSearchParams(**({"max_tokens": MAX_TOKENS} | options))
    rules = rules or GenerationRules(eos_ids=(EOS,))
    beams = search(kind, params, rules)
    rows, scores = expected(kind, params, rules)
    assert [found.token_ids for found in beams.hypotheses()] == rows
    if scores is not None:
        assert [found.score for found in beams.hypotheses()] == pytest.approx(scores, abs=1e-4)
    return beams


EVERY = list(itertools.product([1, 2, 4, 7], [0.6, 1.0, 2.0], [True, False, "never"]))
# Each width with each penalty and each kind of stopping, if not with each pair of them.
SOME = [case for i, case in enumerate(EVERY) if i % 4 == 0 or case == (4, 1.0, False)]


@pytest.mark.parametrize(("width", "penalty", "early"), SOME)
@pytest.mark.parametrize("kind", ["marian", "gpt2"])
def test_hypotheses_and_scores_are_those_of_transformers(kind: str, width: int, penalty: float, early: Any) -> None:
    check(kind, beam_width=width, length_penalty=penalty, early_stopping=early, num_return_sequences=min(3, width))


RULES = {
    "no repeated n-grams": GenerationRules(eos_ids=(EOS,), no_repeat_ngram_size=2),
    "no repeated tokens": GenerationRules(eos_ids=(EOS,), no_repeat_ngram_size=1),
    "forced": GenerationRules(eos_ids=(EOS,), forced_bos_id=17, forced_eos_id=EOS, begin_suppress_ids=(3, 60)),
    "several end tokens": GenerationRules(eos_ids=(EOS, 3, 4)),
    "no end token": GenerationRules(),
    "suppressed": GenerationRules(eos_ids=(EOS,), suppress_ids=(3, 50, 51), begin_suppress_ids=(EOS,)),
    "bad words": GenerationRules(eos_ids=(EOS,), bad_words=((PAD,), (3,), (4, 4), (EOS,), (9, 14, 30))),
    "late end": GenerationRules(eos_ids=(EOS, 3), min_new_tokens=6, forced_eos_id=EOS),
}


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize("kind", ["bart", "gpt2"])
def test_rules_bind_beams_as_they_do_in_transformers(kind: str, rules: GenerationRules) -> None:
    check(kind, rules, beam_width=4, no_repeat_ngram_size=rules.no_repeat_ngram_size)


@pytest.mark.slow
@pytest.mark.parametrize(("width", "penalty", "early"), EVERY)
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_for_every_option_with_every_other(
    kind: str, rules: GenerationRules, width: int, penalty: float, early: Any
) -> None:
    check(kind, rules, beam_width=width, length_penalty=penalty, early_stopping=early)


@pytest.mark.parametrize("options", [{"beam_width": 60}, {"beam_width": 7, "max_tokens": 1}], ids=str)
def test_wide_and_short_searches_are_transformers_too(options: dict[str, Any]) -> None:
    check("marian", **options)


def test_beams_finish_at_different_steps() -> None:
    found = check("bart", beam_width=7).hypotheses()
    assert len({len(each.token_ids) for each in found}) > 3
    assert {each.ended for each in found} == {True, False}
    assert [each.score for each in found] == pytest.approx([each.cum_logprob / len(each.token_ids) for each in found])


def test_an_ignored_end_token_ends_nothing() -> None:
    rules = GenerationRules(eos_ids=(EOS,))
    ignoring = search("marian", BeamSearchParams(4, max_tokens=MAX_TOKENS, ignore_eos=True), rules)
    assert {len(found.token_ids) for found in ignoring.hypotheses()} == {MAX_TOKENS}
    assert not any(found.ended for found in ignoring.hypotheses())
    assert any(EOS in found.token_ids for found in ignoring.hypotheses())


@pytest.mark.parametrize(("patience", "enough"), [(0.5, 2), (1.0, 4), (2.0, 8)])
def test_patience_says_how_many_finished_hypotheses_are_enough(patience: float, enough: int) -> None:
    params = BeamSearchParams(4, max_tokens=30, early_stopping=True, patience=patience)
    beams = search("bart", params, GenerationRules(eos_ids=(EOS,)))
    assert len(beams.finished) == enough
    assert beams.length < 31
    assert len(beams.hypotheses()) == min(4, enough)


def test_hypotheses_that_are_not_there_are_not_returned() -> None:
    """transformers fills up with copies of score -1e9; one forced token makes one hypothesis."""
    rules = GenerationRules(eos_ids=(EOS,), forced_bos_id=17)
    (found,) = search("marian", BeamSearchParams(4, max_tokens=1), rules).hypotheses()
    assert (found.token_ids, found.score, found.ended) == ([17], 0.0, False)


@pytest.mark.parametrize(("value", "message"), [(float("nan"), "finite"), (-float("inf"), "leave no token")])
def test_log_probabilities_that_leave_nothing_are_an_error(value: float, message: str) -> None:
    with pytest.raises(NoContinuation, match=message):
        advance(BeamSearch(BeamSearchParams(3), [1], 9, (EOS,)), torch.full((1, VOCAB), value))


def test_rules_that_contradict_each_other_are_an_error() -> None:
    rules = GenerationRules(eos_ids=(EOS,), forced_bos_id=17, suppress_ids=(17,))
    with pytest.raises(NoContinuation, match="rules leave no token"):
        search("marian", BeamSearchParams(4), rules)


@pytest.mark.parametrize(
    ("field", "value"),
    [("beam_width", 0), ("beam_width", 1025), ("beam_width", 2.0), ("max_tokens", 0), ("length_penalty", float("nan")),
     ("length_penalty", 1000), ("early_stopping", 1), ("early_stopping", "always"), ("num_return_sequences", 0),
     ("num_return_sequences", 5), ("no_repeat_ngram_size", -1), ("patience", 0), ("patience", "a"), ("ignore_eos", 1)],
)  # fmt: skip
def test_a_wrong_parameter_is_a_value_error_that_names_it(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        BeamSearchParams(**({"beam_width": 4} | {field: value}))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_return_sequences"):
        BeamSearchParams(4, patience=0.5, num_return_sequences=3)
