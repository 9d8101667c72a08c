"""Run by ``tools.profile engine --workload gpu`` in a process of its own: transformers' ``generate`` on a static cache.

It stands alone, so that a peer's Python needs nothing of ours. On its standard input is a JSON object: the model's
"model_type" and "values", whether it is "seq2seq", "device", "dtype", "rounds", and "cases", each with "prompts",
"new_tokens" and "beams". For each case, without torch.compile and then with it, it prints one JSON line: "compiled",
the "case"'s number, and the "seconds" of each round for one token and for all of them, or the "error".
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

Rows = list[list[int]]


class Peer:
    def __init__(self, asked: dict[str, Any]) -> None:
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        self.torch, self.seq2seq, self.device = torch, asked["seq2seq"], asked["device"]
        special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "forced_eos_token_id": None}
        if self.seq2seq:
            special["decoder_start_token_id"] = 0
        config = transformers.AutoConfig.for_model(asked["model_type"], **{**special, **asked["values"]})
        auto = transformers.AutoModelForSeq2SeqLM if self.seq2seq else transformers.AutoModelForCausalLM
        torch.manual_seed(0)
        with torch.device(self.device):
            self.model = auto.from_config(config)
        self.model.to(self.device, getattr(torch, asked["dtype"])).eval()
        self.model.generation_config.eos_token_id = None  # nobody stops early

    def seconds(self, case: dict[str, Any], new_tokens: int, compiled: bool) -> float:
        ids, mask = self.padded(case["prompts"])
        start = time.perf_counter()
        with self.torch.inference_mode():
            tokens = self.model.generate(
                ids, attention_mask=mask, max_new_tokens=new_tokens, num_beams=case["beams"], do_sample=False,
                pad_token_id=0, cache_implementation="static", disable_compile=not compiled,
            ).tolist()  # fmt: skip
        seconds = time.perf_counter() - start
        width = 1 if self.seq2seq else ids.shape[1]
        if len(tokens[0]) != width + new_tokens:
            raise ValueError(f"asked for {new_tokens} tokens, got {len(tokens[0]) - width}")
        return seconds

    def padded(self, prompts: Rows) -> tuple[Any, Any]:
        """The prompts side by side, and a mask of what is theirs: sources begin together, decoders' prompts end so."""
        width = max(map(len, prompts))
        ids = self.torch.zeros((len(prompts), width), dtype=self.torch.long)
        mask = self.torch.zeros_like(ids)
        for i, prompt in enumerate(prompts):
            own = slice(len(prompt)) if self.seq2seq else slice(width - len(prompt), width)
            ids[i, own], mask[i, own] = self.torch.tensor(prompt), 1
        return ids.to(self.device), mask.to(self.device)


def main() -> None:
    # Libraries print as they like; what we say goes where they cannot write.
    say = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    asked = json.load(sys.stdin)
    peer = Peer(asked)
    for compiled in (False, True):
        for number, case in enumerate(asked["cases"]):
            answer: dict[str, Any] = {"compiled": compiled, "case": number}
            try:
                lengths = (1, case["new_tokens"])
                rounds = [[peer.seconds(case, n, compiled) for n in lengths] for _ in range(asked["rounds"] + 1)]
                answer["seconds"] = rounds[1:]
            except Exception as error:  # whatever transformers may raise: the next case goes on
                answer["error"] = f"{type(error).__name__}: {error}"
            print(json.dumps(answer), file=say)


if __name__ == "__main__":
    main()
