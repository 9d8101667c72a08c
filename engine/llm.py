"""``LLM``: a model, ready to generate, stream and score."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich import get_console
from rich.progress import Progress

from engine.attention_weights import AttentionWeights, attention_weights
from engine.beam_params import BeamSearchParams
from engine.beam_requests import search_output
from engine.drafters import speculation_of
from engine.engine import Engine
from engine.intake import AnyParams, Intake, Params, Prompts, paired
from engine.metrics import EngineMetrics
from engine.options import EngineOptions, resolve_device, resolve_dtype
from engine.outputs import output_of
from engine.prompts import Prompt, PromptReader
from engine.request import BeamSearchOutput, Delta, EncoderOutput, Request, RequestOutput, ScoreOutput
from engine.runners import open_checkpoint, runner_of
from engine.sampling import SamplingParams, check_priority
from engine.score import score_output, score_request
from engine.streaming import followers_of
from models import checkpoint
from models.assembly import NamedWeights
from models.files import CheckpointError
from models.generation import GenerationConfig
from models.native import live_weights
from models.quantized import quantized_copy
from models.tokenizer import Tokenizer
from models.transformer import DecoderOnly, EncoderDecoder


class LLM:
    """Generates with one model, on a cache preallocated when it is made.

    Args:
        model: a checkpoint folder, a GGUF file, or the id of a repository on the Hub.
        tokenizer: a folder to take the tokenizer from instead.
        device: auto is cuda where there is one, else cpu. dtype: auto is float32 on CPU, bfloat16 on CUDA.
        options: those of ``engine.options.EngineOptions``.

    Raises ValueError (CheckpointError for the folder) for what cannot be served, in one sentence.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        tokenizer: str | Path | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        **options: Any,
    ) -> None:
        if not isinstance(model, str | Path) or not isinstance(tokenizer, str | Path | None):
            raise ValueError("model and tokenizer are paths or names; LLM.from_model takes a live model")
        checked, where = EngineOptions.of(options), resolve_device(device)
        number = resolve_dtype(dtype, where)
        module, own_tokenizer, weights = open_checkpoint(model, checked, where, number)
        if tokenizer is not None:
            own_tokenizer = Tokenizer.load(Path(tokenizer))
            if own_tokenizer is None:
                raise CheckpointError(f"no tokenizer in {tokenizer}")
        # Where the weights are packed for the C++ core, the module has none.
        self._loaded = None if weights is None else (model, where, number)
        self._start(module.eval(), own_tokenizer, checked, weights, where)

    @classmethod
    def from_model(
        cls,
        model: DecoderOnly | EncoderDecoder,
        tokenizer: Tokenizer | None,
        *,
        device: str | torch.device = "auto",
        **options: Any,
    ) -> LLM:
        """An engine around a live model, whose weights it shares, on the device they are on (auto, or its name).

        The model is put into evaluation mode. With ``backend="native"``, and with ``quantization`` on CUDA, the engine
        packs a copy of the weights as they are now; what the model learns later it does not see.
        """
        if not isinstance(model, DecoderOnly | EncoderDecoder) or not isinstance(tokenizer, Tokenizer | None):
            raise ValueError("LLM.from_model takes a model of ours and its tokenizer; LLM takes a folder")
        own = next(model.parameters()).device
        if device != "auto" and resolve_device(device).type != own.type:
            raise ValueError(f"device is {device}, but the model is on {own.type}")
        checked = EngineOptions.of(options)
        packs = checked.packs_for_device(own)
        if checked.quantization is not None and checked.backend != "native" and not packs:
            raise ValueError("a live model is quantised for backend='native' and for CUDA's own kernels alone")
        llm = cls.__new__(cls)
        llm._loaded = None
        weights = None
        model.eval()
        if checked.backend == "native":
            checked.check_native(own)
            weights = live_weights(model, checked.quantization)
        if packs and checked.quantization is not None:
            model = quantized_copy(model, checked.quantization, checked.linear_backend)
        llm._start(model, tokenizer, checked, weights, own)
        llm.engine.weights_may_change = weights is None and not packs
        return llm

    def _start(
        self, model: DecoderOnly | EncoderDecoder, tokenizer: Tokenizer | None, options: EngineOptions,
        weights: NamedWeights | None, device: torch.device,
    ) -> None:  # fmt: skip
        """``weights``: those to pack for the C++ core; None where torch runs the model as it is."""
        if options.num_threads is not None:
            torch.set_num_threads(options.num_threads)
        self.model, self.config, self.tokenizer = model, model.config, tokenizer
        if tokenizer is not None and not tokenizer.files:  # others may list tokens that their model has no row for
            _check_vocabulary(tokenizer.vocab_size, self.config.vocab_size)
            _check_vocabulary(tokenizer.target_vocab_size, self.config.target_vocab_size or 0)
        self.max_model_len = options.model_length(self.config)
        runner = runner_of(model, weights, options)
        self.engine = Engine(runner, tokenizer, options.step_tokens(device), options.num_threads)
        self.engine.speculation = speculation_of(options, self.config, device)
        self.reader = PromptReader(self.config, model.generation, tokenizer, self.max_model_len)
        self.intake = Intake(self.reader, options.seed)
        self._news: dict[Request, None] = {}  # added ones that got something ``step`` has not told yet
        self.lock = threading.RLock()  # threads may share an LLM: their calls take turns, step by step

    def generate(
        self, prompts: Prompts, sampling_params: Params = None, use_tqdm: bool = True, *,
        priority: SequenceOf[int] | None = None,
    ) -> list[RequestOutput]:  # fmt: skip
        """Runs every prompt to its end; outputs in the prompts' order. For an encoder-decoder a prompt is the source.

        ``sampling_params`` are one for all or one a prompt; without any, the model's own generation_config.json counts,
        a beam search included. ``use_tqdm`` shows a progress bar; of ``priority``, one number a prompt, lower ones come
        first. Raises ValueError for a bad prompt or parameter before anything runs.
        """
        requests = self.intake.requests(prompts, sampling_params, beams=True)
        if priority is not None:
            if not isinstance(priority, list | tuple) or len(priority) != len(requests):
                raise ValueError(f"priority must be a list of {len(requests)} integers, one a prompt")
            for request, own in zip(requests, priority, strict=True):
                request.priority = check_priority(own)
        with Progress(disable=not (use_tqdm and _can_show_progress()), transient=True) as progress:
            task = progress.add_task("generating", total=sum(len(request.sequences) for request in requests))
            self._run(requests, lambda finished: progress.update(task, completed=finished))
        return [output_of(request, self.tokenizer) for request in requests]

    def stream(
        self, prompts: Prompts, sampling_params: Params | BeamSearchParams = None
    ) -> Iterator[Delta]:  # fmt: skip
        """Yields what each step adds. Text never ends inside a character, nor in what may become a stop string.

        Of a beam search it yields the tokens that are sure to begin its best hypothesis. Without ``sampling_params``
        the model's own defaults count, but greedy search stands for beams. Closing the iterator aborts what is left.
        """
        requests = self.intake.requests(prompts, sampling_params)
        following = list(followers_of(requests, self.tokenizer))
        with self._queued(requests):
            while following:
                # Another call on this engine may have carried these requests on, or to their end, in between.
                with self.lock:
                    self._step_for(requests)
                    deltas = [follower.look() for follower in following]
                yield from (delta for delta in deltas if delta is not None)
                following = [follower for follower in following if not follower.done]

    def beam_search(
        self, prompts: Prompts, params: BeamSearchParams | SequenceOf[BeamSearchParams] | None = None
    ) -> list[BeamSearchOutput]:
        """The best hypotheses of every prompt, as transformers' ``generate(num_beams=...)`` finds them.

        ``params`` are one for all or one a prompt; without any, the model's own. Raises ValueError for a bad prompt or
        parameter before anything runs, and for a model that asks for no beams where none are given.
        """
        requests = self.intake.searches(prompts, params)
        self._run(requests)
        return [search_output(request, self.tokenizer) for request in requests]

    def chat(
        self, messages: SequenceOf[Mapping[str, str]] | SequenceOf[SequenceOf[Mapping[str, str]]],
        sampling_params: Params = None, use_tqdm: bool = True, **variables: Any,
    ) -> list[RequestOutput]:  # fmt: skip
        """As ``generate``, of a conversation or a list of them, each a list of {"role": ..., "content": ...}.

        The model's chat template makes prompts of them, given ``variables``. Raises ValueError for a model that has
        none, or messages that it does not take.
        """
        options = {field.name for field in dataclasses.fields(SamplingParams)} | {"chat_template", "lora_request"}
        if misplaced := sorted(options & set(variables)):
            raise ValueError(f"chat takes no {misplaced[0]}: what is no variable of the template goes elsewhere")
        if not isinstance(messages, list | tuple) or not messages:
            raise ValueError(
                f"messages are a list of roles and contents, or a list of such lists, got {messages!r:.80}"
            )
        several = [messages] if isinstance(messages[0], Mapping) else messages
        if not all(isinstance(each, list | tuple) and all(isinstance(m, Mapping) for m in each) for each in several):
            raise ValueError(f"messages hold dicts of role and content, got {messages!r:.80}")
        return self.generate([self.chat_prompt(each, **variables) for each in several], sampling_params, use_tqdm)

    def chat_prompt(self, messages: Any, **variables: Any) -> Prompt:
        """A conversation as a prompt: the template writes the special tokens, so none are added around it."""
        if self.tokenizer is None:
            raise ValueError("this model has no tokenizer, so no chat template")
        text = self.tokenizer.apply_chat_template(list(messages), **variables)
        return {"prompt_token_ids": self.tokenizer.encode(text, add_special_tokens=False)}

    def get_tokenizer(self) -> Tokenizer | None:
        return self.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """How the model's makers would sample, by its generation_config.json. Raises ValueError where we cannot."""
        found = self.intake.defaults_after(0, beams=False)
        assert isinstance(found, SamplingParams)
        return found

    def set_generation(self, **changes: Any) -> None:
        """Changes fields of ``models.generation.GenerationConfig`` for the requests to come, such as forced_bos_id.

        Raises ValueError for a field there is not, or a token outside the vocabulary.
        """
        known = [field.name for field in dataclasses.fields(GenerationConfig)]
        if unknown := [name for name in changes if name not in known]:
            raise ValueError(f"a model's generation has no {unknown[0]!r}: choose from {', '.join(known)}")
        for name, value in changes.items():
            if name.endswith("_id") and value is not None:
                self.reader.checked_ids([value], target=True)
            elif name.endswith("_ids"):
                self.reader.checked_ids(value, target=True)
        self.reader.set_generation(dataclasses.replace(self.reader.generation, **changes))

    def set_languages(self, source: str | None = None, target: str | None = None) -> None:
        """Chooses the languages of a model of many for the requests to come, by its tokenizer's codes.

        The target's code becomes the first token of every output. Raises ValueError for a model without languages or
        a code that it does not know.
        """
        if self.tokenizer is None:
            raise ValueError("this model has no tokenizer, so no languages to choose from")
        self.tokenizer.set_languages(source, target)
        if target is not None:
            self.set_generation(forced_bos_id=self.tokenizer.language_id(target))

    def check(self, prompt: Prompt, params: SamplingParams | BeamSearchParams) -> None:
        """Raises the ValueError that ``generate``, or ``beam_search``, would."""
        self.engine.scheduler.check(self.intake.request(prompt, params, draws_seed=False))

    def prompt_length(self, prompt: Prompt) -> int:
        """How many tokens the decoder's prompt has, start token included."""
        return self.intake.prompt_length(prompt)

    def score(self, prompts: SequenceOf[Prompt], targets: SequenceOf[str | SequenceOf[int]]) -> list[ScoreOutput]:
        """The log-probability of each target after its prompt: of an encoder-decoder's whole output (the end token
        included), or of a decoder-only continuation (as given). Raises ValueError for what cannot be scored."""
        lists = all(isinstance(given, list | tuple) for given in (prompts, targets))
        if not lists or len(prompts) != len(targets):
            raise ValueError("score takes a list of prompts and a list of as many targets")
        requests = [
            score_request(self.reader, self.intake.next_id(), prompt, target)
            for prompt, target in zip(prompts, targets, strict=True)
        ]
        self._run(requests)
        for i, request in enumerate(requests):
            if (error := request.sequences[0].error) is not None:
                raise ValueError(f"{error} for target {i}")
        return [score_output(request) for request in requests]

    def encode(self, prompts: Prompts) -> list[EncoderOutput]:
        """The encoder's hidden states of each source, as many of them at once as a step takes.

        Raises ValueError for a bad prompt, and for a model that has no encoder.
        """
        if not self.config.is_encoder_decoder:
            raise ValueError("the model has no encoder: encode takes an encoder-decoder model")
        sources = [self.reader.source_ids(prompt) for prompt, _ in paired(prompts, None)]
        for source in sources:
            self.engine.check_source(source)
        hidden: list[torch.Tensor] = []
        while len(hidden) < len(sources):
            with self.lock:
                hidden += self.engine.encode(sources[len(hidden) :])
        return [EncoderOutput(token_ids, each) for token_ids, each in zip(sources, hidden, strict=True)]

    def attention_weights(self, prompt: Prompt, output: str | SequenceOf[int]) -> AttentionWeights:
        """What every token of the decoder's prompt and of ``output``, as text or ids, looks at in all layers and heads.

        One pass in torch, beside the engine; where the C++ core runs the model, its weights are read again for it.
        Raises ValueError for a prompt or an output that does not fit.
        """
        request = self.reader.request("", prompt, SamplingParams(), seed=0)
        token_ids = request.prompt_token_ids + self.reader.target_ids(output)
        if len(token_ids) > self.max_model_len:
            raise ValueError(
                f"prompt and output are {len(token_ids)} tokens, beyond max_model_len {self.max_model_len}"
            )  # fmt: skip
        model = self.model if self._loaded is None else checkpoint.load(*self._loaded)[0].eval()
        return attention_weights(model, token_ids, request.encoder_prompt_token_ids)

    def add_request(
        self, request_id: str, prompt: Prompt, params: AnyParams = None, priority: int = 0
    ) -> None:  # fmt: skip
        """Queues one prompt for ``step``; a lower ``priority`` comes first. Without ``params`` the model's own count.

        Raises ValueError for a bad prompt, parameter or priority, and for an id that is in progress.
        """
        request = self.intake.request(prompt, params, request_id=request_id)
        request.priority = check_priority(priority)
        request.on_change = lambda changed: self._news.update({changed: None})
        with self.lock:
            self.engine.add_request(request)

    def step(self) -> list[RequestOutput]:
        """Runs one step of everything that is queued; the outputs so far of the requests added that got something.

        What another call's steps have done for them meanwhile is told, too.
        """
        with self.lock:
            self.engine.step()
            news, self._news = self._news, {}
            return [output_of(request, self.tokenizer) for request in news]

    def abort(self, request_id: str) -> None:
        """Ends a request and frees what it holds at once; one that is not in progress is passed over."""
        with self.lock:
            if isinstance(request_id, str) and (request := self.engine.scheduler.find(request_id)) is not None:
                self.engine.abort(request)
                self._news.pop(request, None)  # who aborts a request asks for no more of it

    def has_unfinished_requests(self) -> bool:
        """Whether ``step`` has anything left to do, or to tell."""
        return self.engine.has_unfinished_requests() or bool(self._news)

    def get_metrics(self) -> EngineMetrics:
        """How much is running and waiting, how full the cache is, and how fast the engine has been."""
        return self.engine.metrics()

    def reset_prefix_cache(self) -> None:
        """Lets nothing that is cached be found again, as when the model's weights have been changed."""
        with self.lock:
            self.engine.cache.forget_all()

    def _run(self, requests: list[Request], show: Callable[[int], None] = lambda finished: None) -> None:
        """Runs requests to their end, those first that may take longest: none of them is then left alone at the end.

        ``show`` is told how many sequences are finished, after each step.
        """
        remaining = dict.fromkeys(requests)
        finished = 0

        def count(request: Request) -> None:
            nonlocal finished
            if request.finished and request in remaining:
                del remaining[request]
                finished += len(request.sequences)

        for request in requests:
            request.on_change = count
        with self._queued(sorted(requests, key=_hoped_length, reverse=True)):
            while self._step_for(remaining):
                show(finished)

    @contextlib.contextmanager
    def _queued(self, requests: list[Request]) -> Iterator[None]:
        """Queues requests, and on the way out, whatever the reason, aborts those that are not finished."""
        for request in requests:
            self.engine.scheduler.check(request)
        try:
            with self.lock:
                for request in requests:
                    self.engine.add_request(request)
            yield
        finally:
            with self.lock:
                for request in requests:
                    self.engine.abort(request)

    def _step_for(self, requests: Iterable[Request]) -> bool:
        """A step of the engine; False: there was none, as all of these requests are finished, perhaps by others'."""
        with self.lock:
            if all(request.finished for request in requests):
                return False
            self.engine.step()
            return True


def _check_vocabulary(tokens: int, rows: int) -> None:
    if tokens > rows:
        raise ValueError(f"the tokenizer has {tokens} tokens, the model {rows}")


def _can_show_progress() -> bool:
    # In a notebook rich draws with ipywidgets, and warns at every call where they are missing.
    return not get_console().is_jupyter or find_spec("ipywidgets") is not None


def _hoped_length(request: Request) -> int:
    return len(request.encoder_prompt_token_ids or ()) + request.sequences[0].max_length
