"""``python -m engine.generate``: text from a model on the command line, one prompt, a dialogue, or a file of them."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from engine.beam_params import BeamSearchParams
from engine.llm import LLM
from engine.prompts import Prompt
from engine.request import BeamSequence, CompletionOutput
from engine.sampling import SamplingParams

Answer = CompletionOutput | BeamSequence


def main(arguments: list[str]) -> int:
    options = build_parser().parse_args(arguments)
    try:
        run(options)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m engine.generate",
        description="Generates text with a model, greedily unless options say otherwise.",
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="a checkpoint folder, a .gguf file or a Hub id")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--prompt", "--source", dest="prompt", metavar="TEXT", help="the prompt, or the source to translate"
    )
    what.add_argument("--interactive", action="store_true", help="read prompts from the terminal, a line each")
    what.add_argument("--input", metavar="FILE", help="prompts, a line each, or .jsonl with the key prompt or source")
    parser.add_argument("--output", metavar="FILE.jsonl", help="where --input's results go, an object a line")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--max-tokens", type=int, default=128, metavar="N", help="most tokens generated (128)")
    length.add_argument("--max-length", type=int, metavar="N", help="most tokens of prompt and output together")
    sampling = parser.add_argument_group("sampling")
    for name, kind, default in (
        ("temperature", float, 0.0), ("top-k", int, 0), ("top-p", float, 1.0), ("min-p", float, 0.0), ("n", int, 1),
        ("seed", int, None), ("repetition-penalty", float, 1.0), ("presence-penalty", float, 0.0),
        ("frequency-penalty", float, 0.0), ("logprobs", int, None), ("no-repeat-ngram-size", int, 0),
        ("min-tokens", int, 0),
    ):  # fmt: skip
        sampling.add_argument(f"--{name}", type=kind, default=default, help=f"({default})")
    sampling.add_argument("--stop", action="append", metavar="TEXT", help="end the text here; may be given repeatedly")
    sampling.add_argument("--beam-width", type=int, metavar="N", help="search with so many beams instead of sampling")
    sampling.add_argument(
        "--length-penalty", type=float, default=1.0, help="of beams: above 1 favours long outputs (1)"
    )
    model = parser.add_argument_group("model")
    model.add_argument("--task", metavar="NAME", help="of the model's task_specific_params: puts its prefix first")
    model.add_argument("--source-language", metavar="CODE", help="of a model of many languages, such as eng_Latn")
    model.add_argument("--target-language", metavar="CODE", help="the language to translate into")
    model.add_argument("--chat", action="store_true", help="put each prompt into the model's chat template")
    engine = parser.add_argument_group("engine")
    engine.add_argument("--device", default="auto", help="auto, cpu or cuda (auto)")
    engine.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16 (auto)")
    engine.add_argument("--num-threads", type=int, help="CPU threads")
    return parser


def run(options: argparse.Namespace) -> None:
    """Does what the parsed options say. Raises ValueError or OSError for a user's mistake."""
    if (options.input is None) != (options.output is None):
        raise ValueError("--input and --output go together")
    prompts = read_prompts(Path(options.input)) if options.input else {}
    if options.output:
        check_output(Path(options.output), Path(options.input))
    # A wrong value should not wait for the model to load.
    (sampling_params if options.beam_width is None else beam_params)(options, options.max_tokens)
    llm = LLM(options.model, device=options.device, dtype=options.dtype, num_threads=options.num_threads)
    if options.source_language or options.target_language:
        llm.set_languages(options.source_language, options.target_language)
    if options.interactive:
        for line in typed_lines():
            try:
                show(llm, line, options)
            except ValueError as error:
                print(f"error: {error}")
    elif options.input:
        asked = []
        for number, prompt in prompts.items():
            try:
                asked.append(given(llm, prompt, options))
                llm.check(asked[-1], params_of(llm, asked[-1], options))
            except ValueError as error:
                raise ValueError(f"{options.input}, line {number}: {error}") from None
        write_outputs(Path(options.output), list(prompts.values()), answers(llm, asked, options))
    else:
        show(llm, options.prompt, options)


def show(llm: LLM, prompt: str, options: argparse.Namespace) -> None:
    """Prints the output as it comes; several samples, or what a search found, one after the other when it is done."""
    asked = given(llm, prompt, options)
    params = params_of(llm, asked, options)
    if isinstance(params, SamplingParams) and params.n == 1 and params.logprobs is None:
        for delta in llm.stream(asked, params):
            print(delta.text, end="", flush=True)
            if delta.finish_reason == "error":
                print()
                raise ValueError("the model gave no finite logits, or its rules left no token")
        print()
        return
    for answer in answers(llm, [asked], options)[0]:
        if answer.finish_reason == "error":
            raise ValueError(getattr(answer, "error", None) or "generation failed")
        print(answer.text if options.logprobs is None else json.dumps(asdict(answer), ensure_ascii=False))


def answers(llm: LLM, prompts: list[Prompt], options: argparse.Namespace) -> list[list[Answer]]:
    """Each prompt's samples or, with --beam-width, the hypotheses of its search; one with the error where it failed."""
    params = [params_of(llm, prompt, options) for prompt in prompts]
    if options.beam_width is None:
        sampled = llm.generate(prompts, cast(list[SamplingParams], params), use_tqdm=len(prompts) > 1)
        return [list(output.outputs) for output in sampled]
    searched = llm.beam_search(prompts, cast(list[BeamSearchParams], params))
    return [list(output.sequences) if output.error is None else [_failed(output.error)] for output in searched]


def _failed(error: str) -> CompletionOutput:
    return CompletionOutput(0, "", [], finish_reason="error", error=error)


def given(llm: LLM, prompt: str, options: argparse.Namespace) -> Prompt:
    """The prompt as the engine takes it: in the chat template, behind the task's prefix."""
    return llm.chat_prompt([{"role": "user", "content": prompt}]) if options.chat else prompt


def params_of(llm: LLM, prompt: Prompt, options: argparse.Namespace) -> SamplingParams | BeamSearchParams:
    """What the options ask for: a search with --beam-width, else samples."""
    limit = max_tokens(llm, prompt, options)
    return sampling_params(options, limit) if options.beam_width is None else beam_params(options, limit)


def sampling_params(options: argparse.Namespace, limit: int) -> SamplingParams:
    names = ("temperature", "top_k", "top_p", "min_p", "n", "seed", "repetition_penalty", "presence_penalty",
             "frequency_penalty", "logprobs", "stop", "no_repeat_ngram_size", "min_tokens",
             "task")  # fmt: skip
    return SamplingParams(max_tokens=limit, **{name: getattr(options, name) for name in names})


def beam_params(options: argparse.Namespace, limit: int) -> BeamSearchParams:
    for name in ("temperature", "top_k", "top_p", "min_p", "seed", "presence_penalty", "frequency_penalty", "logprobs",
                 "stop"):  # fmt: skip
        if getattr(options, name) != build_parser().get_default(name):
            raise ValueError(f"--{name.replace('_', '-')} belongs to sampling: leave it or --beam-width out")
    names = ("beam_width", "length_penalty", "no_repeat_ngram_size", "repetition_penalty", "min_tokens", "task")
    return BeamSearchParams(
        max_tokens=limit, num_return_sequences=options.n, **{name: getattr(options, name) for name in names}
    )


def max_tokens(llm: LLM, prompt: Prompt, options: argparse.Namespace) -> int:
    """--max-tokens, or what --max-length leaves once the decoder's prompt is counted."""
    if options.max_length is None:
        return options.max_tokens
    used = 1 if llm.config.is_encoder_decoder else llm.prompt_length(prompt)
    if options.max_length <= used:
        raise ValueError(f"--max-length {options.max_length} leaves no room after a prompt of {used} tokens")
    return options.max_length - used


def typed_lines() -> Iterator[str]:
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if line.strip():
            yield line


def check_output(path: Path, source: Path) -> None:
    """Raises ValueError or OSError now for what would lose the results once they are there."""
    if path.is_dir():
        raise ValueError(f"--output {path} is a folder: expected a file")
    if path.exists() and path.samefile(source):
        raise ValueError("--input and --output are the same file")
    path.open("a").close()


def read_prompts(path: Path) -> dict[int, str]:
    """The prompts of a file by line number, from 1; empty lines are passed over."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ValueError(f"no input file at {path}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text") from None
    lines = {number: line for number, line in enumerate(text.split("\n"), 1) if line.strip()}
    if not lines:
        raise ValueError(f"{path} is empty")
    if path.suffix != ".jsonl":
        return lines
    return {number: _prompt_of(line, f"{path}, line {number}") for number, line in lines.items()}


def _prompt_of(line: str, place: str) -> str:
    try:
        entry: Any = json.loads(line)
    except (ValueError, RecursionError):
        entry = None
    prompt = entry.get("prompt", entry.get("source")) if isinstance(entry, dict) else None
    if not isinstance(prompt, str):
        raise ValueError(f"{place}: expected a JSON object with a string prompt or source")
    return prompt


def write_outputs(path: Path, prompts: list[str], outputs: list[list[Answer]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for prompt, found in zip(prompts, outputs, strict=True):
            entry = {"prompt": prompt, "outputs": [asdict(answer) for answer in found]}
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
