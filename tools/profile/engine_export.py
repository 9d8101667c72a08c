"""Run by ``tools.profile engine`` under the peers' Python: writes a Hugging Face folder in a peer's own format.

It stands alone. Arguments: WHO FOLDER OUTPUT PRECISION causal|seq2seq.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def ctranslate2(folder: str, output: str, precision: str, seq2seq: bool) -> None:
    """One file for all precisions: the weights are quantised as they are loaded."""
    from ctranslate2.converters import TransformersConverter

    TransformersConverter(folder).convert(output)


def openvino(folder: str, output: str, precision: str, seq2seq: bool) -> None:
    from optimum.intel import OVModelForCausalLM, OVModelForSeq2SeqLM, OVWeightQuantizationConfig

    name_kept_tensors()
    compressed: dict[str, dict[str, Any]] = {
        "fp32": {"load_in_8bit": False},
        "int8": {"load_in_8bit": True},
        "int4": {"quantization_config": OVWeightQuantizationConfig(bits=4, group_size_fallback="adjust")},
    }
    kind = OVModelForSeq2SeqLM if seq2seq else OVModelForCausalLM
    kind.from_pretrained(folder, export=True, compile=False, **compressed[precision]).save_pretrained(output)


def name_kept_tensors() -> None:
    """Gives names to what a decoder keeps of its source.

    optimum-intel 1.27 calls these states by their tensors' names, which the models of newer versions of torch lack.
    """
    from optimum.exporters.openvino import stateful

    insert = stateful.insert_state_for_nodes

    def named(model: Any, nodes: Any) -> None:
        for node in nodes:
            for i, output in enumerate(node.outputs()):
                if not output.get_names():
                    output.get_tensor().set_names({f"kept.{node.get_friendly_name()}.{i}"})
        insert(model, nodes)

    stateful.insert_state_for_nodes = named


def main(who: str, folder: str, output: str, precision: str, kind: str) -> None:
    {"ctranslate2": ctranslate2, "openvino": openvino}[who](folder, output, precision, kind == "seq2seq")
    print(json.dumps({}))


if __name__ == "__main__":
    main(*sys.argv[1:])
