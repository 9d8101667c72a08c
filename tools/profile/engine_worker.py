"""Run by ``tools.profile engine`` in a process of its own: opens a model once, then times what it is asked to generate.

It stands alone, so that a peer's Python needs nothing of ours. Arguments: WHO and a JSON object, see ``Settings``; WHO
alone to ask whether it is there. A line {"prompts": [[...], ...], "new_tokens": [1, 64]} is answered by one line with
the seconds of each length, what they went into (ours alone) and the last one's tokens; {"prompts": ..., "check":
[[...], ...]} by how good these tokens are to the model (transformers alone).
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PACKAGES = {
    "tandem": "engine", "transformers": "transformers", "ctranslate2": "ctranslate2", "openvino": "optimum.intel",
}  # fmt: skip
Rows = list[list[int]]
Answer = Callable[[Any, dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class Settings:
    """folder: what the contender opens. hint: OpenVINO's precision of activations, f32 or bf16."""

    folder: str
    precision: str  # of weights: fp32, int8 or int4
    threads: int
    seq2seq: bool
    beams: int  # 1 is greedy
    sequences: int  # the largest batch there will be
    hint: str = "f32"


class Tandem:
    def __init__(self, settings: Settings) -> None:
        from engine import LLM

        quantized = {} if settings.precision == "fp32" else {"quantization": settings.precision}
        sequences = settings.sequences * settings.beams
        # The same prompts come round after round: what the cache knows of them would spare us work that others do.
        self.llm = LLM(
            settings.folder, num_threads=settings.threads, max_num_seqs=sequences, enable_prefix_caching=False,
            **quantized,
        )  # fmt: skip
        self.beams = settings.beams

    def generate(self, prompts: Rows, new_tokens: int) -> Rows:
        from engine import BeamSearchParams, SamplingParams

        given: list[Any] = [{"prompt_token_ids": prompt} for prompt in prompts]
        if self.beams > 1:
            search = BeamSearchParams(self.beams, min_tokens=new_tokens, max_tokens=new_tokens)
            return [list(output.sequences[0].token_ids) for output in self.llm.beam_search(given, search)]
        greedy = SamplingParams(temperature=0, min_tokens=new_tokens, max_tokens=new_tokens)
        outputs = self.llm.generate(given, greedy, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def take_seconds(self) -> dict[str, float]:
        return self.llm.engine.take_seconds()


class Generator:
    """What transformers and optimum-intel have in common: ``generate``."""

    def __init__(self, settings: Settings) -> None:
        import torch

        torch.set_num_threads(settings.threads)
        self.settings = settings
        self.model: Any = self.open()

    def open(self) -> Any:
        import transformers

        auto = transformers.AutoModelForSeq2SeqLM if self.settings.seq2seq else transformers.AutoModelForCausalLM
        return auto.from_pretrained(self.settings.folder).eval()

    def generate(self, prompts: Rows, new_tokens: int) -> Rows:
        import torch

        ids, mask = self._padded(prompts)
        with torch.inference_mode():
            tokens = self.model.generate(
                ids, attention_mask=mask, min_new_tokens=new_tokens, max_new_tokens=new_tokens,
                num_beams=self.settings.beams, do_sample=False, pad_token_id=self._pad,
            )  # fmt: skip
        return tokens[:, -new_tokens:].tolist()

    @property
    def _pad(self) -> int:
        return self.model.config.pad_token_id or 0

    def _padded(self, prompts: Rows) -> tuple[Any, Any]:
        """The prompts side by side, and a mask of what is theirs: sources begin together, decoders' prompts end so."""
        import torch

        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), self._pad)
        mask = torch.zeros_like(ids)
        for i, prompt in enumerate(prompts):
            own = slice(len(prompt)) if self.settings.seq2seq else slice(width - len(prompt), width)
            ids[i, own], mask[i, own] = torch.tensor(prompt), 1
        return ids, mask


class Transformers(Generator):
    def check(self, prompts: Rows, rows: Rows) -> list[dict[str, float]]:
        """Of each row given its own prefixes: its log-probability, and how far below the best logit a token's ever is.

        That distance is in standard deviations of the logits; the end token, which nobody may choose, is left out.
        """
        import torch

        answers = []
        for prompt, row in zip(prompts, rows, strict=True):
            with torch.inference_mode():
                logits = self._logits(prompt, row).double()
                spread = logits.std(-1)
                logits[:, self.model.config.eos_token_id] = -torch.inf
                chosen = logits.gather(1, torch.tensor(row)[:, None])[:, 0]
                below = float(((logits.amax(-1) - chosen) / spread).max())
                likely = float((chosen - logits.logsumexp(-1)).sum())
            answers.append({"below": below, "log-probability": likely})
        return answers

    def _logits(self, prompt: list[int], row: list[int]) -> Any:
        """(len(row), vocabulary): those that each token of the row was chosen from."""
        import torch

        if self.settings.seq2seq:
            start = self.model.config.decoder_start_token_id
            target = torch.tensor([[start, *row[:-1]]])
            return self.model(input_ids=torch.tensor([prompt]), decoder_input_ids=target).logits[0]
        return self.model(input_ids=torch.tensor([[*prompt, *row[:-1]]])).logits[0, len(prompt) - 1 :]


class OpenVINO(Generator):
    def open(self) -> Any:
        from optimum.intel import OVModelForCausalLM, OVModelForSeq2SeqLM

        kind = OVModelForSeq2SeqLM if self.settings.seq2seq else OVModelForCausalLM
        # Where there is AMX, float32 weights run in bfloat16 unless the hint says otherwise.
        chosen = {"INFERENCE_NUM_THREADS": str(self.settings.threads), "INFERENCE_PRECISION_HINT": self.settings.hint}
        return kind.from_pretrained(
            self.settings.folder, device="CPU", ov_config={"PERFORMANCE_HINT": "LATENCY", **chosen}
        )


class CTranslate2:
    def __init__(self, settings: Settings) -> None:
        import ctranslate2 as ct2

        kind = ct2.Translator if settings.seq2seq else ct2.Generator
        compute = {"fp32": "float32", "int8": "int8"}[settings.precision]
        self.model = kind(
            settings.folder, device="cpu", compute_type=compute, inter_threads=1, intra_threads=settings.threads
        )
        names = ("shared_vocabulary.json", "target_vocabulary.json", "vocabulary.json")
        file = next(path for name in names if (path := Path(settings.folder) / name).is_file())
        self.words = json.loads(file.read_text())
        self.numbers = {word: i for i, word in enumerate(self.words)}
        self.settings = settings

    def generate(self, prompts: Rows, new_tokens: int) -> Rows:
        words = [[self.words[i] for i in prompt] for prompt in prompts]
        if self.settings.seq2seq:
            length = {"min_decoding_length": new_tokens, "max_decoding_length": new_tokens}
            results = self.model.translate_batch(words, beam_size=self.settings.beams, **length)
            rows = [result.hypotheses[0] for result in results]
        else:
            length = {"min_length": new_tokens, "max_length": new_tokens}
            only = {"include_prompt_in_result": False, "beam_size": self.settings.beams}
            rows = [result.sequences[0] for result in self.model.generate_batch(words, **length, **only)]
        return [[self.numbers[word] for word in row] for row in rows]

    def generate_each(self, prompts: Rows, lengths: list[int], got: Callable[[int, int], None]) -> None:
        """Each prompt's greedy tokens, as many as its own length; ``got`` hears of each, by prompt. A row that is
        through leaves the batch."""
        words = [[self.words[i] for i in prompt] for prompt in prompts]
        left = list(lengths)

        def hear(result: Any) -> bool:
            got(result.batch_id, result.token_id)
            left[result.batch_id] -= 1
            return left[result.batch_id] == 0

        longest = max(lengths)
        if self.settings.seq2seq:
            length = {"min_decoding_length": longest, "max_decoding_length": longest}
            self.model.translate_batch(words, beam_size=1, callback=hear, **length)
        else:
            length = {"min_length": longest, "max_length": longest}
            self.model.generate_batch(words, beam_size=1, include_prompt_in_result=False, callback=hear, **length)


CONTENDERS: dict[str, Callable[[Settings], Any]] = {
    "tandem": Tandem, "transformers": Transformers, "ctranslate2": CTranslate2, "openvino": OpenVINO,
}  # fmt: skip


def answer(contender: Any, request: dict[str, Any]) -> dict[str, Any]:
    """What a request comes to, as the module says."""
    prompts = request["prompts"]
    if "check" in request:
        return {"check": contender.check(prompts, request["check"])}
    seconds, spent = [], []
    for length in request["new_tokens"]:
        start = time.perf_counter()
        rows = contender.generate(prompts, length)
        seconds.append(time.perf_counter() - start)
        spent.append(contender.take_seconds() if hasattr(contender, "take_seconds") else {})
        if [len(row) for row in rows] != [length] * len(prompts):
            raise ValueError(f"asked for {length} tokens, got {sorted({len(row) for row in rows})}")
    return {"seconds": seconds, "spent": spent, "tokens": rows}


def main(who: str, settings: str = "", *, answer: Answer = answer) -> None:
    """Opens the model, then answers line after line; workers of other workloads bring their own ``answer``."""
    # Libraries print as they like; what we say goes where they cannot write.
    say = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    if not settings:  # only asked whether it is there
        if find_spec(PACKAGES[who]) is None:
            raise ModuleNotFoundError(f"No module named {PACKAGES[who]!r}")
        print(json.dumps({}), file=say)
        return
    contender = CONTENDERS[who](Settings(**json.loads(settings)))
    print(json.dumps({}), file=say)
    for line in sys.stdin:
        print(json.dumps(answer(contender, json.loads(line))), file=say)


if __name__ == "__main__":
    main(*sys.argv[1:])
