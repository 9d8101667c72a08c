"""Run by ``tools.profile load`` in a process of its own: opens a folder, generates a token, prints what it took.

It stands alone, so that a peer's Python needs nothing of ours. Arguments: WHO FOLDER THREADS causal|seq2seq, where
"tandem int8" is our own with weights quantised on their way; WHO alone to ask whether it is there; or ``convert FOLDER
OUTPUT`` for what CTranslate2 does beforehand.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROMPT = list(range(100, 132))
PACKAGES = {"tandem": "engine", "transformers": "transformers", "ctranslate2": "ctranslate2"}
SPECIAL = {"<pad>": 0, "</s>": 1, "<unk>": 2}
Open = Callable[[], int]  # opens the model and returns its first token


def tandem(folder: str, threads: int, seq2seq: bool, quantization: Any = None) -> Open:
    from engine import LLM, SamplingParams

    def first_token() -> int:
        llm = LLM(folder, num_threads=threads, quantization=quantization)
        params = SamplingParams(temperature=0, max_tokens=1)
        return llm.generate({"prompt_token_ids": PROMPT}, params, use_tqdm=False)[0].outputs[0].token_ids[0]

    return first_token


def transformers(folder: str, threads: int, seq2seq: bool) -> Open:
    import torch
    import transformers

    torch.set_num_threads(threads)
    auto = transformers.AutoModelForSeq2SeqLM if seq2seq else transformers.AutoModelForCausalLM
    kind = auto._model_mapping  # importing the classes is importing, as it is for the others
    config = transformers.AutoConfig.from_pretrained(folder)
    kind[type(config)]

    def first_token() -> int:
        model = auto.from_pretrained(folder).eval()
        ids = torch.tensor([PROMPT])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False)
        return int(out[0, -1])

    return first_token


def ctranslate2(folder: str, threads: int, seq2seq: bool) -> Open:
    import ctranslate2 as ct2

    words = [f"w{i}" for i in PROMPT]

    def first_token() -> int:
        if seq2seq:
            translator = ct2.Translator(folder, device="cpu", intra_threads=threads)
            result = translator.translate_batch([words], beam_size=1, max_decoding_length=1, return_end_token=True)
            tokens = result[0].hypotheses[0]
        else:
            generator = ct2.Generator(folder, device="cpu", intra_threads=threads)
            only = {"max_length": 1, "include_prompt_in_result": False, "return_end_token": True}
            tokens = generator.generate_batch([words], beam_size=1, **only)[0].sequences[0]
        return SPECIAL[tokens[0]] if tokens[0] in SPECIAL else int(tokens[0].removeprefix("w"))

    return first_token


def convert(folder: str, output: str) -> None:
    from ctranslate2.converters import TransformersConverter

    TransformersConverter(folder).convert(output)


def peak_bytes() -> int:
    """The most memory this process has held, mapped files included (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def main(who: str, folder: str = "", *rest: str) -> None:
    if not folder:  # only asked whether it is there
        __import__(PACKAGES[who.split()[0]])
        print(json.dumps({}))
        return
    if who == "convert":
        convert(folder, rest[0])
        print(json.dumps({}))
        return
    started = time.perf_counter()
    contenders: dict[str, Callable[..., Open]] = {
        "tandem": tandem, "transformers": transformers, "ctranslate2": ctranslate2,
    }  # fmt: skip
    name, *quantization = who.split()
    first_token = contenders[name](folder, int(rest[0]), rest[1] == "seq2seq", *quantization)
    imported, before = time.perf_counter(), peak_bytes()
    token = first_token()
    seconds = time.perf_counter() - imported
    weights = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
    result = {"token": token, "seconds": seconds, "imports": imported - started, "bytes": weights}
    print(json.dumps({**result, "peak": peak_bytes() - before}))


if __name__ == "__main__":
    main(*sys.argv[1:])
