"""What a caller of ``LLM`` may count on."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from rich import get_console
from tokenizers import Tokenizer as Vocabulary
from tokenizers.processors import TemplateProcessing

from engine import LLM, SamplingParams
from engine.batch import Batch
from engine.runner import TorchRunner
from models import DecoderOnly, EncoderDecoder, load
from models.tokenizer import Tokenizer, train_vocabulary
from tests.conftest import TEXTS, tiny_model
from tests.engine.llms import DEVICE, llm_from, llm_of


@pytest.fixture
def llm(model_folder: Path) -> LLM:
    return llm_from(model_folder)


GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def test_outputs_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    words = ["abc", "a", "세계", "xyz 12"]
    outputs = llm.generate(words, GREEDY, use_tqdm=False)
    asked = [o.encoder_prompt if llm.config.is_encoder_decoder else o.prompt for o in outputs]
    assert asked == words
    assert all(o.finished and o.outputs[0].finish_reason == "length" for o in outputs)
    assert all(len(o.outputs[0].token_ids) == 12 for o in outputs)


def test_a_notebook_without_widgets_gets_no_warning(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(get_console(), "is_jupyter", True)
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    assert llm.generate("abc", GREEDY)[0].finished


def test_text_is_what_the_token_ids_say(llm: LLM) -> None:
    completion = llm.generate("abc", GREEDY, use_tqdm=False)[0].outputs[0]
    assert llm.tokenizer is not None
    assert completion.text == llm.tokenizer.decode(completion.token_ids)


def test_a_stream_adds_up_to_what_generate_returns(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, max_tokens=20, seed=3, n=2)
    texts: dict[tuple[int, int], str] = {}
    tokens: dict[tuple[int, int], list[int]] = {}
    for delta in llm.stream(["abc", "안녕"], params):
        key = delta.request_index, delta.index
        texts[key] = texts.get(key, "") + delta.text
        tokens[key] = tokens.get(key, []) + delta.token_ids
    for i, output in enumerate(llm.generate(["abc", "안녕"], params, use_tqdm=False)):
        for completion in output.outputs:
            assert texts[i, completion.index] == completion.text
            assert tokens[i, completion.index] == completion.token_ids


def test_samples_of_one_prompt_differ_and_repeat_by_seed(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, n=4, seed=11, max_tokens=10, ignore_eos=True)
    first, second = (llm.generate("abc", params, use_tqdm=False)[0].outputs for _ in range(2))
    assert [c.token_ids for c in first] == [c.token_ids for c in second]
    assert len({tuple(c.token_ids) for c in first}) > 1
    assert [c.index for c in first] == [0, 1, 2, 3]
    unseeded = SamplingParams(temperature=1.0, max_tokens=10, ignore_eos=True)
    a, b = (llm.generate("abc", unseeded, use_tqdm=False)[0].outputs[0].token_ids for _ in range(2))
    assert a != b


def test_every_prompt_may_have_parameters_of_its_own(llm: LLM) -> None:
    outputs = llm.generate(
        ["abc", "abc"], [SamplingParams(max_tokens=3, ignore_eos=True), SamplingParams(max_tokens=6, ignore_eos=True)],
        use_tqdm=False,
    )  # fmt: skip
    assert [len(o.outputs[0].token_ids) for o in outputs] == [3, 6]


def test_a_stop_token_ends_the_text(llm: LLM) -> None:
    free = llm.generate("abc", GREEDY, use_tqdm=False)[0].outputs[0].token_ids
    stop = free[4]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, stop_token_ids=[stop])
    completion = llm.generate("abc", params, use_tqdm=False)[0].outputs[0]
    assert completion.token_ids == free[: free.index(stop) + 1]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)


class Scripted:
    """Makes a model say a given text, whatever it is asked."""

    def __init__(self, model: DecoderOnly | EncoderDecoder, tokenizer: Tokenizer, text: str) -> None:
        self.tokenizer, self.ids, self.step = tokenizer, [*tokenizer.encode_target(text), 2], 0
        self.llm = llm_of(model, tokenizer)
        runner = self.llm.engine.runner
        assert isinstance(runner, TorchRunner)
        runner.logits, runner.graphs = self.logits, None  # type: ignore[method-assign]

    def logits(self, batch: Batch) -> torch.Tensor:
        logits = torch.full((int(batch.wanted.sum()), self.tokenizer.target_vocab_size), -10.0, device=DEVICE)
        logits[:, self.ids[min(self.step, len(self.ids) - 1)]] = 10.0  # a step may have been sent behind the end
        self.step += 1
        return logits


def scripted(text: str, kind: str = "char") -> LLM:
    vocabulary = train_vocabulary(kind, [*TEXTS, "😀"] if kind == "char" else TEXTS, 270)  # type: ignore[arg-type]
    tokenizer = Tokenizer(vocabulary)
    return Scripted(tiny_model("decoder_only", vocab_size=tokenizer.vocab_size), tokenizer, text).llm


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_ends_the_text_across_tokens(include: bool) -> None:
    params = SamplingParams(temperature=0, max_tokens=30, stop=["stop", "xyz"], include_stop_str_in_output=include)
    completion = scripted("abc stop def").generate("a", params, use_tqdm=False)[0].outputs[0]
    assert completion.text == ("abc stop" if include else "abc ")
    assert (completion.finish_reason, completion.stop_reason) == ("stop", "stop")


def test_a_stream_holds_back_what_may_become_a_stop_string() -> None:
    params = SamplingParams(temperature=0, max_tokens=30, stop="stop")
    pieces = [delta.text for delta in scripted("a sto st stop b").stream("a", params)]
    assert "".join(pieces) == "a sto st "


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_korean_and_emoji_stream_whole(kind: str) -> None:
    text = "안녕 세계 😀"
    params = SamplingParams(temperature=0, max_tokens=60)
    pieces = [delta.text for delta in scripted(text, kind).stream("a", params)]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_the_end_token_is_counted_but_not_shown() -> None:
    completion = (
        scripted("abc").generate("a", SamplingParams(temperature=0, max_tokens=30), use_tqdm=False)[0].outputs[0]
    )
    assert completion.text == "abc"
    assert completion.token_ids[-1] == 2
    assert (completion.finish_reason, completion.stop_reason) == ("stop", None)


def test_log_probabilities_name_the_chosen_and_the_likeliest(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, max_tokens=5, logprobs=3, seed=5, ignore_eos=True)
    completion = llm.generate("abc", params, use_tqdm=False)[0].outputs[0]
    assert completion.logprobs is not None
    total = 0.0
    for token, entry in zip(completion.token_ids, completion.logprobs, strict=True):
        assert 3 <= len(entry) <= 4
        assert sorted(e.rank for e in entry.values())[:3] == [1, 2, 3]
        total += entry[token].logprob
    assert completion.cumulative_logprob == pytest.approx(total)


@torch.no_grad()
def test_scores_are_the_models_log_probabilities(llm: LLM, model_folder: Path) -> None:
    pairs = [("abc", "12"), ("세계", "xy z"), ("q", "0")]
    scores = llm.score([p for p, _ in pairs], [t for _, t in pairs])
    model, tokenizer = load(model_folder)
    assert tokenizer is not None
    for (prompt, target), score in zip(pairs, scores, strict=True):
        source, ids = tokenizer.encode(prompt), tokenizer.encode_target(target)
        if isinstance(model, EncoderDecoder):
            ids = [*ids, 2]
            logits = model(torch.tensor([source]), torch.tensor([[1, *ids[:-1]]]))[0]
        else:
            logits = model(torch.tensor([source + ids[:-1]]))[0, len(source) - 1 :]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
        assert score.token_ids == ids
        torch.testing.assert_close(torch.tensor(score.logprobs), expected, atol=1e-4, rtol=1e-4)
        assert score.total == pytest.approx(sum(score.logprobs))


def test_a_row_that_is_not_finite_fails_alone() -> None:
    model = tiny_model("decoder_only", tie_embeddings=False)
    with torch.no_grad():
        model.decoder.embedding.tokens.weight[50] = float("nan")
    llm = llm_of(model)
    prompts = [{"prompt_token_ids": [5, 6]}, {"prompt_token_ids": [50]}, {"prompt_token_ids": [7]}]
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    outputs = [output.outputs[0] for output in llm.generate(prompts, params, use_tqdm=False)]
    assert [o.finish_reason for o in outputs][1] == "error"
    assert outputs[1].error
    assert [len(o.token_ids) for o in outputs][::2] == [6, 6]
    # and it leaves nothing behind in the blocks it held
    again = [output.outputs[0] for output in llm.generate(prompts[::2], params, use_tqdm=False)]
    assert [o.token_ids for o in again] == [o.token_ids for o in outputs[::2]]


def test_a_decoder_prompt_starts_the_target() -> None:
    llm = llm_of(tiny_model("encoder_decoder"))
    prompt = {
        "encoder_prompt": {"prompt_token_ids": [5, 6, 7]},
        "decoder_prompt": {"prompt_token_ids": [9, 10]},
    }
    output = llm.generate(prompt, GREEDY, use_tqdm=False)[0]
    assert output.prompt_token_ids == [1, 9, 10]
    assert output.encoder_prompt_token_ids == [5, 6, 7]


def test_an_empty_source_is_answered(tokenizer: Tokenizer) -> None:
    llm = llm_of(tiny_model("encoder_decoder", vocab_size=tokenizer.vocab_size), tokenizer)
    assert llm.generate("", GREEDY, use_tqdm=False)[0].outputs[0].finish_reason == "length"


def test_from_model_shares_the_live_weights() -> None:
    model = tiny_model("decoder_only").to(DEVICE)
    llm = llm_of(model)
    before = llm.generate({"prompt_token_ids": [5]}, GREEDY, use_tqdm=False)[0].outputs[0].token_ids
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(9)))
    assert llm.generate({"prompt_token_ids": [5]}, GREEDY, use_tqdm=False)[0].outputs[0].token_ids != before


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({"prompt_token_ids": [5, 600]}, "token id 600"),
        ({"prompt_token_ids": [-1]}, "token id -1"),
        ({"prompt_token_ids": ["a"]}, "list of integers"),
        ({"tokens": [5]}, "a prompt is a string"),
        (5, "a prompt is a string"),
        ({"prompt_token_ids": None}, "list of integers"),
        ({"prompt_token_ids": [5] * 65}, "max_model_len"),
        ("abc", "no tokenizer"),
    ],
)
@pytest.mark.parametrize("architecture", ["encoder_decoder", "decoder_only"])
def test_a_bad_prompt_is_refused_before_anything_runs(architecture: str, prompt: object, message: str) -> None:
    llm = llm_of(tiny_model(architecture))
    with pytest.raises(ValueError, match=message):
        llm.generate([{"prompt_token_ids": [5]}, prompt], GREEDY, use_tqdm=False)  # type: ignore[list-item]
    assert not llm.engine.has_unfinished_requests()


def test_an_empty_prompt_of_a_language_model_is_refused() -> None:
    llm = llm_of(tiny_model("decoder_only"))
    with pytest.raises(ValueError, match="empty"):
        llm.generate({"prompt_token_ids": []}, GREEDY)


@pytest.mark.parametrize(
    "options",
    [{"max_num_seqs": 0}, {"max_model_len": 65}, {"kv_cache_memory_bytes": 1}, {"num_threads": 0}, {"device": "tpu"},
     {"device": "mps"}, {"backend": "cuda"}, {"quantization": "int3"},
     {"quantization": "int8"}, {"kv_cache_dtype": "int4"}, {"temperature": 1},
     {"backend": "native", "block_size": 8}, {"backend": "native", "kv_cache_dtype": "fp8"},
     {"gpu_memory_utilization": 0}, {"gpu_memory_utilization": 2}, {"enforce_eager": 1}, {"tensor_parallel_size": 2},
     {"batch_invariant": True, "backend": "torch"}, {"num_threads": 10**8}, {"seed": [1]},
     {"kv_cache_memory_bytes": 10**18}],
)  # fmt: skip
def test_an_engine_that_cannot_be_is_a_sentence(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"\w+ .*"):
        LLM.from_model(tiny_model("decoder_only"), None, **({"device": "cpu"} | options)).generate(  # type: ignore[arg-type]
            {"prompt_token_ids": [5]}, GREEDY, use_tqdm=False
        )


@pytest.mark.parametrize(
    ("field", "value"),
    [("n", 0), ("n", 10**9), ("temperature", -1), ("temperature", float("nan")), ("top_p", 0), ("top_p", 1.5),
     ("top_k", -2), ("min_p", 2), ("presence_penalty", 3), ("frequency_penalty", "a"), ("repetition_penalty", 0),
     ("max_tokens", 0), ("seed", 2**70), ("seed", 1.5), ("stop", [""]), ("stop_token_ids", [-1]), ("logprobs", 129),
     ("ignore_eos", 1), ("temperature", 1e39), ("top_p", 1e-46), ("repetition_penalty", 1e-46), ("stop", 5),
     ("stop_token_ids", 2)],
)  # fmt: skip
def test_a_wrong_parameter_is_a_value_error_that_names_it(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        SamplingParams(**{field: value})  # type: ignore[arg-type]


def test_a_stop_token_beyond_the_vocabulary_is_refused(llm: LLM) -> None:
    with pytest.raises(ValueError, match="stop_token_ids"):
        llm.generate("abc", SamplingParams(stop_token_ids=[10**6]))


def test_prompts_that_are_none_are_refused(llm: LLM) -> None:
    with pytest.raises(ValueError, match="prompts are a prompt or a list"):
        llm.generate(5)  # type: ignore[arg-type]


def test_a_stream_loses_nothing_when_another_call_runs_in_between(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
    expected = llm.generate("abc", params, use_tqdm=False)[0].outputs[0]
    stream = llm.stream("abc", params)
    deltas = [next(stream)]
    llm.generate("xyz", params, use_tqdm=False)
    deltas += list(stream)
    assert "".join(delta.text for delta in deltas) == expected.text
    assert [token for delta in deltas for token in delta.token_ids] == expected.token_ids
    assert deltas[-1].finish_reason == "length"


def test_the_engine_survives_a_call_that_fails(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.runner, "logits", interrupt)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["abc", "xyz"], GREEDY, use_tqdm=False)
    assert not llm.engine.has_unfinished_requests()
    assert llm.score(["abc"], ["12"])[0].total < 0
    assert llm.generate("abc", GREEDY, use_tqdm=False)[0].finished


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_scoring_what_is_not_finite_leaves_nothing_behind(backend: str) -> None:
    model = tiny_model("decoder_only", tie_embeddings=False)
    with torch.no_grad():
        model.decoder.embedding.tokens.weight[50] = float("nan")
    llm = llm_of(model, backend=backend)
    before = llm.generate({"prompt_token_ids": [5]}, GREEDY, use_tqdm=False)[0].outputs[0]
    with pytest.raises(ValueError, match="no finite logits for target 0"):
        llm.score([{"prompt_token_ids": [5]}], [[50] * 30])
    assert llm.generate({"prompt_token_ids": [5]}, GREEDY, use_tqdm=False)[0].outputs[0] == before


def test_an_idle_engine_steps_to_nothing(llm: LLM) -> None:
    assert llm.engine.step() == []


def test_the_backend_asked_for_runs_the_encoder_too(monkeypatch: pytest.MonkeyPatch) -> None:
    import kernels.attention

    seen = []
    plain = kernels.attention.reference.attention
    packed = kernels.attention.reference.masked_attention
    monkeypatch.setattr(kernels.attention.reference, "attention", lambda *a, **k: seen.append(1) or plain(*a, **k))
    monkeypatch.setattr(
        kernels.attention.reference, "masked_attention", lambda *a, **k: seen.append(1) or packed(*a, **k)
    )
    llm = llm_of(tiny_model("encoder_decoder"), backend="reference")
    llm.engine.runner.encoder_hidden([[5, 6, 7]])
    assert seen


def test_a_tokenizer_that_is_not_there_is_refused(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no tokenizer"):
        LLM(model_folder, tokenizer=tmp_path)


def test_threads_may_share_one_engine(llm: LLM) -> None:
    from concurrent.futures import ThreadPoolExecutor

    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    words = ["abc", "xyz 12", "q", "세계"]
    expected = [output.outputs[0].token_ids for output in llm.generate(words, params, use_tqdm=False)]

    def work(turn: int) -> list[list[int]]:
        if turn % 2:
            texts = {word: [t for d in llm.stream(word, params) for t in d.token_ids] for word in words}
            return list(texts.values())
        return [output.outputs[0].token_ids for output in llm.generate(words, params, use_tqdm=False)]

    with ThreadPoolExecutor(4) as pool:
        assert all(result == expected for result in pool.map(work, range(12)))


@pytest.mark.parametrize("prompt", ["a\ud800", {"prompt": "\udfff"}])
def test_text_that_is_not_unicode_is_refused(llm: LLM, prompt: str) -> None:
    with pytest.raises(ValueError, match="not valid Unicode"):
        llm.generate(prompt, GREEDY)


def test_a_device_and_dtype_may_be_torchs_own(model_folder: Path) -> None:
    llm = LLM(model_folder, device=torch.device("cpu"), dtype=torch.bfloat16)
    assert llm.generate("abc", GREEDY, use_tqdm=False)[0].finished


@pytest.mark.parametrize("given", [None, 5, {"a"}, "abc"])
def test_score_takes_lists(llm: LLM, given: object) -> None:
    with pytest.raises(ValueError, match="list of prompts"):
        llm.score(given, given)  # type: ignore[arg-type]


def test_a_continuation_is_scored_without_the_token_that_begins_a_text(tokenizer: Tokenizer) -> None:
    vocabulary = Vocabulary.from_str(tokenizer.source.to_str())
    vocabulary.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    llm = LLM.from_model(tiny_model("decoder_only", vocab_size=tokenizer.vocab_size), Tokenizer(vocabulary))
    (text,) = llm.score(["abc"], ["de"])
    assert text.token_ids == tokenizer.encode("de")
    with pytest.raises(ValueError, match="empty"):
        llm.score(["abc"], [""])
