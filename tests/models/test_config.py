from __future__ import annotations

import pytest

from models import ConfigError, TransformerConfig


def test_computed_defaults_are_filled_in_once() -> None:
    config = TransformerConfig("encoder_decoder", vocab_size=10, dim=64, heads=4, depth=3)
    assert (config.head_dim, config.kv_heads, config.ffn_dim, config.encoder_depth) == (16, 4, 256, 3)


def test_a_config_survives_the_way_through_json() -> None:
    config = TransformerConfig("decoder_only", vocab_size=10, dim=64, heads=4, kv_heads=2, activation="swiglu")
    assert TransformerConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"dim": 65}, "dim"),
        ({"kv_heads": 3}, "kv_heads"),
        ({"activation": "tanh"}, "activation"),
        ({"dropout": 1.0}, "dropout"),
        ({"depth": 0}, "depth"),
        ({"dim": "64"}, "dim"),
        ({"bias": 1}, "bias"),
        ({"head_dim": 15}, "head_dim"),
        ({"norm_eps": 0.0}, "norm_eps"),
        ({"architecture": "decoder"}, "architecture"),
    ],
)
def test_an_impossible_value_is_a_sentence_that_names_it(changes: dict[str, object], named: str) -> None:
    values = {"architecture": "decoder_only", "vocab_size": 10, "dim": 64, "heads": 4} | changes
    with pytest.raises(ConfigError, match=named):
        TransformerConfig(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"model_type": "gpt5"}, "gpt5"),
        ({"model_type": "tandem", "architecture": "decoder_only", "vocab_size": 4, "dimm": 3}, "dimm"),
        ({"model_type": "tandem", "architecture": "decoder_only"}, "vocab_size"),
    ],
)
def test_a_foreign_or_incomplete_config_is_refused(values: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        TransformerConfig.from_dict(values)
