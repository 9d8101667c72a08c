"""A folder that cannot be loaded is one sentence that names what is wrong, at once and whatever the file says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import models
from engine import LLM
from models import CheckpointError
from models.families import FAMILIES
from models.tokenizer import Tokenizer, train_vocabulary
from tests.models import tokenizer_folders
from tests.models.made_folders import llama_config, llama_shapes, t5_config, t5_shapes, write

Damage = Callable[[Path], object]
SECONDS = 3.0  # what an error may take on a busy machine


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path, llama_config(), llama_shapes(llama_config()))


def refused(folder: Path) -> str:
    """The sentence that loading ends in."""
    begun = time.perf_counter()
    with pytest.raises(CheckpointError) as caught:
        models.load(folder)
    assert time.perf_counter() - begun < SECONDS
    sentence = str(caught.value)
    assert str(folder) in sentence
    assert "\n" not in sentence
    assert len(sentence) < len(str(folder)) + 400
    return sentence


def configured(folder: Path, **changes: Any) -> Path:
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v != "absent"}))
    return folder


def test_the_folders_load_as_they_are(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert models.load(folder)[0].config.depth == 2
    assert models.load(write(tmp_path_factory.mktemp("t5"), t5_config(), t5_shapes(t5_config())))[0].config.depth == 2


@pytest.mark.parametrize("model_type", ["gpt5", "absent", None, [], {}, 3, ["llama"]])
def test_an_unknown_model_type_lists_those_there_are(model_type: object, folder: Path) -> None:
    sentence = refused(configured(folder, model_type=model_type))
    assert all(name in sentence for name in FAMILIES)


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"])
def test_a_missing_key_is_named(key: str, folder: Path) -> None:
    assert f"lacks '{key}'" in refused(configured(folder, **{key: "absent"}))


@pytest.mark.parametrize("value", ["abc", -5, 0, 10**9, 10**12, 10**400, None, [], {}, True, 0.5, [64], float("inf")])
@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"])
def test_an_impossible_size_is_refused_without_making_it(key: str, value: object, folder: Path) -> None:
    ours = {"hidden_size": "dim", "num_hidden_layers": "depth", "num_attention_heads": "heads"}.get(key, key)
    sentence = refused(configured(folder, **{key: value}))
    assert key in sentence or ours in sentence


OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"num_key_value_heads": "abc"}, "num_key_value_heads in config.json is 'abc': expected int"),
    ({"num_key_value_heads": 3}, "kv_heads 3 does not divide"),
    ({"head_dim": "abc"}, "head_dim"),
    ({"head_dim": 10**12}, "head_dim"),
    ({"hidden_act": "mish"}, "hidden_act 'mish' is not supported"),
    ({"hidden_act": []}, "hidden_act"),
    ({"rms_norm_eps": "abc"}, "rms_norm_eps"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    ({"rms_norm_eps": -1}, "norm_eps"),
    ({"rope_theta": "abc"}, "rope_theta"),
    ({"rope_theta": 0}, "rope_theta"),
    ({"rope_theta": 10**400}, "rope_theta"),
    ({"attention_bias": "yes"}, "attention_bias in config.json is 'yes': expected bool"),
    ({"tie_word_embeddings": []}, "tie_word_embeddings"),
    ({"max_position_embeddings": 10**12}, "max_seqlen"),
    ({"rope_scaling": "linear"}, "rope_scaling"),
    ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope_type 'longrope' is not supported"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic' is not supported"),
    ({"rope_scaling": {"rope_type": ["linear"]}}, "rope_type"),
    ({"rope_scaling": {"rope_type": "linear"}}, "lacks 'factor'"),
    ({"rope_scaling": {"rope_type": "linear", "factor": "two"}}, "factor"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2, "beta_fast": 0}}, "beta_fast"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2, "attention_factor": "x"}}, "attention_factor"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 2, "low_freq_factor": 4, "high_freq_factor": 1}}, "freq"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "differ from layer to layer"),
    ({"model_type": "mistral", "sliding_window": "abc"}, "window"),
    ({"model_type": "mistral", "sliding_window": 4, "layer_types": 3}, "layer_types"),
    ({"model_type": "mistral", "sliding_window": 4, "layer_types": [[1]]}, "layer_types"),
    ({"model_type": "phi", "qk_layernorm": True}, "qk_layernorm"),
    ({"model_type": "gemma2", "query_pre_attn_scalar": 0}, "query_pre_attn_scalar"),
    ({"model_type": "gemma2", "query_pre_attn_scalar": -1}, "query_pre_attn_scalar"),
    ({"model_type": "gemma", "use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantization_config of 'bitsandbytes'"),
    ({"eos_token_id": "</s>"}, "eos_token_id"),
    ({"task_specific_params": [1]}, "task_specific_params"),
    ({"task_specific_params": {"summarize": {"prefix": 5}}}, "prefix"),
]


@pytest.mark.parametrize(("changes", "message"), OPTIONS)
def test_an_option_that_cannot_be_had_is_named(changes: dict[str, Any], message: str, folder: Path) -> None:
    assert message in refused(configured(folder, **changes))


ENCODER_DECODERS: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "t5", "feed_forward_proj": 5}, "feed_forward_proj"),
    ({"model_type": "t5", "feed_forward_proj": "twice-relu"}, "feed_forward_proj"),
    ({"model_type": "t5", "d_model": 0}, "dim is 0"),
    ({"model_type": "t5", "d_model": -4}, "dim is -4"),
    ({"model_type": "t5", "relative_attention_num_buckets": 10**30}, "relative_buckets"),
    ({"model_type": "t5", "decoder_start_token_id": 60}, "decoder_start_token_id is 60, beyond the vocabulary of 60"),
    ({"model_type": "t5", "num_layers": 10**7}, "depth"),
    ({"model_type": "bart", "decoder_attention_heads": 2}, "encoder_attention_heads 4 and decoder_attention_heads 2"),
    ({"model_type": "bart", "encoder_layers": 10**7}, "encoder_depth"),
    ({"model_type": "marian", "max_position_embeddings": 10**7}, "max_seqlen 10000000 of dim 32 is too much"),
    ({"model_type": "m2m_100", "pad_token_id": 10**7}, "sinusoidal positions"),
    ({"model_type": "m2m_100", "pad_token_id": -10}, "position_offset"),
]


@pytest.mark.parametrize(("changes", "message"), ENCODER_DECODERS)
def test_an_encoder_decoder_that_cannot_be_had_is_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = write(tmp_path, t5_config(), t5_shapes(t5_config()))
    sides = {f"{side}_{name}": size for side in ("encoder", "decoder")
             for name, size in {"layers": 2, "attention_heads": 4, "ffn_dim": 48}.items()}  # fmt: skip
    assert message in refused(configured(folder, **{**sides, **changes}))


FILES: list[tuple[str, str | bytes, str]] = [
    ("config.json", "[]", "config.json does not hold a JSON object"),
    ("config.json", b"\xff\xfe{}", "config.json is not valid JSON"),
    ("config.json", '{"a":' * 100_000, "config.json is not valid JSON"),
    ("config.json", '{"hidden_size": ' + "1" * 5000 + "}", "config.json is not valid JSON"),
    ("config.json", "", "config.json is not valid JSON"),
    ("generation_config.json", "greedy", "generation_config.json is not valid JSON"),
    ("generation_config.json", "[]", "generation_config.json does not hold a JSON object"),
    ("generation_config.json", '{"bad_words_ids": 5}', "bad_words_ids"),
    ("generation_config.json", '{"bad_words_ids": [5]}', "bad_words_ids"),
    ("generation_config.json", '{"bad_words_ids": [[]]}', "bad_words_ids"),
    ("generation_config.json", '{"bad_words_ids": [["a"]]}', "bad_words_ids"),
    ("generation_config.json", '{"suppress_tokens": {"a": 1}}', "suppress_tokens"),
    ("generation_config.json", '{"suppress_tokens": [1.5]}', "suppress_tokens"),
    ("generation_config.json", '{"begin_suppress_tokens": [true]}', "begin_suppress_tokens"),
    ("generation_config.json", '{"forced_bos_token_id": 99}', "forced_bos_token_id is 99, beyond the vocabulary of 60"),
    ("generation_config.json", '{"num_beams": "four"}', "num_beams is 'four': expected int"),
    ("generation_config.json", '{"do_sample": 1}', "do_sample"),
    ("generation_config.json", '{"max_length": [20]}', "max_length"),
    ("tokenizer.json", "{", "cannot read the tokenizer"),
    ("tokenizer.json", "null", "cannot read the tokenizer"),
    ("tokenizer.json", b"\xff", "cannot read the tokenizer"),
    ("tokenizer_config.json", "[]", "tokenizer_config.json does not hold a JSON object"),
    ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}', "tokenizer_config.json describes no tokenizer"),
    ("spiece.model", b"\x08\x96\x01", "spiece.model"),
    ("model.safetensors", b"\xff" * 64, "model.safetensors is truncated or corrupt"),
    ("model.safetensors", (10**12).to_bytes(8, "little"), "model.safetensors is truncated or corrupt"),
]


@pytest.mark.parametrize(("name", "content", "message"), FILES)
def test_a_broken_file_is_named(name: str, content: str | bytes, message: str, folder: Path) -> None:
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    assert message in refused(folder)


@pytest.mark.parametrize("code", [[], {}, 5, "xx"])
def test_a_language_that_is_none_is_named(code: object, tmp_path: Path) -> None:
    write(tmp_path, t5_config(), t5_shapes(t5_config()))
    tokenizer_folders.mbart(tmp_path, src_lang=code)
    configured(tmp_path, **t5_config())
    assert f"the tokenizer has no language {code!r}" in refused(tmp_path)


def test_an_empty_folder_lacks_its_config(tmp_path: Path) -> None:
    assert "config.json is missing" in refused(tmp_path)


def changed(change: Callable[[dict[str, Tensor]], object]) -> Damage:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return damage


def cut(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-1])


def index(folder: Path, shard: str, *more: str) -> None:
    names = [*load_file(folder / "model.safetensors"), *more]
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    content = json.dumps({"weight_map": dict.fromkeys(names, shard)})
    (folder / "model.safetensors.index.json").write_text(content)


LAYER = "model.layers.1"
WEIGHTS: list[tuple[Damage, str]] = [
    (changed(lambda t: t.pop("model.norm.weight")), "lacks 1 weights of the model, the first model.norm.weight"),
    (changed(lambda t: t.pop(f"{LAYER}.self_attn.k_proj.weight")), f"{LAYER}.self_attn.q_proj.weight"),
    (changed(lambda t: t.update(stray=torch.ones(1))), "has 1 weights the model lacks, the first stray"),
    (changed(lambda t: t.update({f"{LAYER}.mlp.up_proj.bias": torch.ones(48)})), f"{LAYER}.mlp.up_proj.bias"),
    (changed(lambda t: t.update({"model.norm.weight": torch.ones(31)})), "model.norm.weight is (31,)"),
    (changed(lambda t: t.update({"model.norm.weight": torch.tensor(1.0)})), "model.norm.weight is ()"),
    (changed(lambda t: t.update({"model.embed_tokens.weight": torch.ones(61, 32)})), "is (61, 32), the config asks"),
    (changed(lambda t: t.update({f"{LAYER}.self_attn.k_proj.weight": torch.ones(15, 32)})), "is (63, 32)"),
    (changed(lambda t: t.update({f"{LAYER}.self_attn.k_proj.weight": torch.ones(16, 31)})), "k_proj.weight is (16,"),
    (changed(lambda t: t.update({f"{LAYER}.self_attn.k_proj.weight": torch.ones(16, 32, 1)})), "k_proj.weight is"),
    (changed(lambda t: t.update({f"{LAYER}.self_attn.k_proj.weight": torch.tensor(1.0)})), "the config asks for"),
    (changed(lambda t: t.update({"model.norm.weight": torch.ones(32).int()})), "norm.weight holds torch.int32,"),
    (changed(lambda t: t.update({f"{LAYER}.mlp.up_proj.weight": torch.ones(48, 32).byte()})), "holds torch.uint8"),
    (cut, "model.safetensors is truncated or corrupt"),
    (lambda folder: index(folder, "../model-1.safetensors"), "outside its folder"),
    (lambda folder: index(folder, "model-2.safetensors"), "names the shard 'model-2.safetensors', which is missing"),
    (lambda folder: index(folder, "model-1.safetensors", "stray"), "model-1.safetensors lacks stray"),
    (lambda folder: (folder / "model.safetensors").unlink(), "has no weights"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), WEIGHTS)
def test_weights_that_do_not_fit_are_named(damage: Damage, message: str, folder: Path) -> None:
    damage(folder)
    assert message in refused(folder)


@pytest.mark.parametrize("same", [True, False])
def test_a_head_in_the_file_of_a_tied_model_counts_where_it_differs(same: bool, folder: Path) -> None:
    if same:
        changed(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))(folder)
    model, _ = models.load(configured(folder, tie_word_embeddings=True))
    assert model.config.tie_embeddings is same
    stored = load_file(folder / "model.safetensors")
    assert torch.equal(model.lm_head.weight, stored["lm_head.weight"])
    assert torch.equal(model.decoder.embedding.tokens.weight, stored["model.embed_tokens.weight"])


def test_ids_beyond_the_vocabulary_never_come(folder: Path) -> None:
    generation = {"suppress_tokens": [5, 60], "bad_words_ids": [[1, 60], [3]], "eos_token_id": [2, 10**12]}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    read = models.load(folder)[0].generation
    assert (read.suppress_ids, read.bad_words, read.eos_ids) == ((5,), ((3,),), (2,))


def test_a_tokenizer_larger_than_the_model_is_one_sentence(folder: Path) -> None:
    vocabulary = train_vocabulary("char", ["".join(map(chr, range(200, 257)))], 0)
    Tokenizer(vocabulary).save(folder)
    with pytest.raises(ValueError, match="the tokenizer has 61 tokens, the model 60"):
        LLM(folder)


def test_a_source_tokenizer_larger_than_the_model_is_one_sentence(tmp_path: Path) -> None:
    write(tmp_path, t5_config(), t5_shapes(t5_config()))
    source = train_vocabulary("char", ["".join(map(chr, range(200, 257)))], 0)
    Tokenizer(source, train_vocabulary("char", ["a"], 0)).save(tmp_path)
    with pytest.raises(ValueError, match="the tokenizer has 61 tokens, the model 60"):
        LLM(tmp_path)


PEAK = """
import sys, torch, models
from pathlib import Path

def resident(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

models.load(sys.argv[1])  # whatever the first load brings into memory for good
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
before = resident("VmRSS")
model, _ = models.load(sys.argv[2], dtype=getattr(torch, sys.argv[3]))
print((resident("VmHWM") - before) / sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="reads its memory from Linux's /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_loading_peaks_at_little_more_than_the_weights(
    family: str, dtype: str, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    make, shapes = (llama_config, llama_shapes) if family == "llama" else (t5_config, t5_shapes)
    # 300 MB of tensors that are small beside them: the one being read is mapped beside the model.
    config = make(dim=1024, depth=6 if family == "llama" else 3, ffn=3072, vocab=2000)
    large = write(tmp_path_factory.mktemp("large"), config, shapes(config))
    command = [sys.executable, "-W", "error", "-c", PEAK, str(folder), str(large), dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1.15
