"""Offline programs written for vLLM run with nothing changed but their imports."""

from __future__ import annotations

import json
import re

import pytest
from jsonschema import validate

from engine import LLM, BeamSearchParams, SamplingParams, StructuredOutputsParams
from models.checkpoint import save
from models.tokenizer import Tokenizer, train_vocabulary
from tests.conftest import tiny_model

PROMPTS = [
    "Hello, my name is",
    "The president of the United States is",
    "The capital of France is",
    "The future of AI is",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    texts = [*PROMPTS, "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ 0123456789 {}[]\":,.-_@=*()'\n+!?"]
    tokenizer = Tokenizer(train_vocabulary("bpe", texts * 20, 320))
    folder = tmp_path_factory.mktemp("opt-125m")
    save(folder, tiny_model("decoder_only", vocab_size=tokenizer.vocab_size, max_seqlen=256), tokenizer)
    return str(folder)


def test_basic(model: str) -> None:
    sampling_params = SamplingParams(temperature=0.8, top_p=0.95)
    llm = LLM(model=model)
    outputs = llm.generate(PROMPTS, sampling_params)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        assert output.prompt == prompt
        assert len(output.outputs[0].text) > 0 and len(output.outputs[0].token_ids) <= 16


def test_generate_with_the_models_own_parameters(model: str) -> None:
    llm = LLM(model=model, max_num_seqs=4, max_model_len=128, seed=3, enable_prefix_caching=True)
    sampling_params = llm.get_default_sampling_params()
    assert sampling_params == SamplingParams()
    sampling_params = SamplingParams(max_tokens=5, temperature=0.7, top_k=20)
    outputs = llm.generate(prompts=PROMPTS, sampling_params=sampling_params, use_tqdm=False)
    assert [len(output.outputs[0].token_ids) <= 5 for output in outputs] == [True] * 4


def test_beam_search(model: str) -> None:
    llm = LLM(model=model, dtype="float32")  # in bfloat16, a GPU's own, scores may tie
    params = BeamSearchParams(beam_width=5, max_tokens=50)
    outputs = llm.beam_search([{"prompt": "Hello, my name is "}], params)
    for output in outputs:
        assert len(output.sequences) == 5
        scores = [sequence.score for sequence in output.sequences]
        assert scores == sorted(scores, reverse=True) and len(set(scores)) == 5
        assert isinstance(output.sequences[0].text, str) and output.sequences[0].tokens


def test_n_samples_stop_strings_seeds_and_log_probabilities(model: str) -> None:
    llm = LLM(model=model, dtype="float32")
    params = [
        SamplingParams(n=3, temperature=0.8, top_p=0.95, seed=1234),
        SamplingParams(temperature=0.0, logprobs=5, prompt_logprobs=1, presence_penalty=0.2),
        SamplingParams(n=2, temperature=1.5, stop=["e", "a "], max_tokens=200),
        SamplingParams(temperature=1.0, seed=42, min_tokens=3, ignore_eos=True, frequency_penalty=1.0),
    ]
    first, second = llm.generate(PROMPTS, params), llm.generate(PROMPTS, params)
    assert [c.token_ids for c in first[0].outputs] == [c.token_ids for c in second[0].outputs]
    assert first[3].outputs[0].token_ids == second[3].outputs[0].token_ids
    logprobs = first[1].outputs[0].logprobs
    assert logprobs is not None and first[1].prompt_logprobs is not None
    for token_id, entry in zip(first[1].outputs[0].token_ids, logprobs, strict=True):
        assert entry[token_id].rank >= 1 and entry[token_id].decoded_token is not None
        assert len(entry) >= 5
    assert len(first[1].prompt_logprobs) == len(first[1].prompt_token_ids)
    for completion in first[2].outputs:
        assert completion.finish_reason in ("stop", "length")
        assert "e" not in completion.text and "a " not in completion.text


def generate_text(prompt: str, sampling_params: SamplingParams, llm: LLM) -> str:
    return llm.generate(prompt, sampling_params=sampling_params)[0].outputs[0].text


def test_structured_outputs(model: str) -> None:
    llm = LLM(model=model, max_model_len=256)
    options = {"temperature": 1.0, "seed": 5, "max_tokens": 200}
    choice = StructuredOutputsParams(choice=["Positive", "Negative"])
    prompt = "Classify this sentiment: vLLM is wonderful!"
    assert generate_text(prompt, SamplingParams(structured_outputs=choice), llm) in ("Positive", "Negative")

    regex = StructuredOutputsParams(regex=r"\w{1,9}@\w{1,9}\.com\n")
    params = SamplingParams(structured_outputs=regex, stop=["\n"], max_tokens=50)
    assert re.fullmatch(r"\w{1,9}@\w{1,9}\.com", generate_text("Generate an email address", params, llm))

    schema = {
        "type": "object",
        "properties": {"brand": {"type": "string", "maxLength": 8}, "car_type": {"enum": ["sedan", "SUV", "Truck"]}},
        "required": ["brand", "car_type"],
    }
    assert llm.tokenizer is not None
    # A model that has learned nothing would fill its page with white space.
    white = [i for i in range(llm.tokenizer.vocab_size) if not llm.tokenizer.decode([i]).strip()]
    for given in (schema, json.dumps(schema)):
        params = SamplingParams(
            structured_outputs=StructuredOutputsParams(json=given), logit_bias=dict.fromkeys(white, -50.0), **options
        )  # type: ignore[arg-type]
        validate(json.loads(generate_text("Generate a JSON with the brand and car_type", params, llm)), schema)

    grammar = """
root ::= select_statement
select_statement ::= "SELECT " column " from " table " where " condition
column ::= "col_1 " | "col_2 "
table ::= "table_1 " | "table_2 "
condition ::= column "= " number
number ::= "1 " | "2 "
"""
    params = SamplingParams(structured_outputs=StructuredOutputsParams(grammar=grammar), max_tokens=100)
    text = generate_text("Generate an SQL query to show the 'username' and 'email'", params, llm)
    assert re.fullmatch(r"SELECT col_[12]  from table_[12]  where col_[12] = [12] ", text)


def test_samples_with_grammars_of_their_own_share_a_step(model: str) -> None:
    llm = LLM(model=model, dtype="float32")
    words = [["red", "green", "blue"], ["one", "two"], ["yes", "no", "maybe"]]
    params = [
        SamplingParams(
            n=4, temperature=1.5, seed=i, structured_outputs=StructuredOutputsParams(choice=each), logprobs=1
        )
        for i, each in enumerate(words)
    ]
    plain = SamplingParams(temperature=0, max_tokens=20)
    alone = llm.generate("x", plain)[0].outputs[0].token_ids
    outputs = llm.generate(["a", "b", "c", "x"], [*params, plain])
    for output, allowed in zip(outputs[:3], words, strict=True):
        assert all(completion.text in allowed for completion in output.outputs)
        assert all(completion.finish_reason == "stop" for completion in output.outputs)
    assert outputs[3].outputs[0].token_ids == alone
    ending = SamplingParams(max_tokens=50, ignore_eos=True, structured_outputs=StructuredOutputsParams(choice=["abc"]))
    assert llm.generate("x", ending)[0].outputs[0].text == "abc"


def test_a_shape_that_cannot_be_is_a_sentence(model: str) -> None:
    llm = LLM(model=model)
    for wrong in ({"regex": "("}, {"json": {"type": "nothing"}}, {"grammar": "root := 5"}):
        with pytest.raises(ValueError, match=r"\w+ \w+"):
            llm.generate("a", SamplingParams(structured_outputs=StructuredOutputsParams(**wrong)))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="structured_outputs"):
        SamplingParams(structured_outputs={"regex": "a"})  # type: ignore[arg-type]
