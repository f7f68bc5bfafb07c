"""Added and special tokens of a converted CLIP tokenizer, which openvino_tokenizers looks up without their ending."""

from __future__ import annotations

import numpy as np
import openvino as ov
from openvino import opset15 as ops

__all__ = ["end_added_tokens"]

_BEGINS, _ENDS, _CHARACTERS, _IDS = -4, -3, -2, -1
"""Inputs of a BPETokenizer for added tokens, counted from the last."""


def end_added_tokens(model: ov.Model) -> None:
    """Let the byte-pair encoder know its added tokens with the mark of a word's end, too.

    It puts that mark behind every piece of text before it looks the piece up, also behind one that is an added token,
    and would read the mark itself as four more tokens.
    """
    for encoder in model.get_ordered_ops():
        if encoder.get_type_name() != "BPETokenizer" or encoder.get_input_size() not in (15, 18):
            continue
        suffix = str(encoder.get_attributes()["end_suffix"]).encode()
        ports = {
            place: encoder.input(encoder.get_input_size() + place) for place in (_BEGINS, _ENDS, _CHARACTERS, _IDS)
        }
        nodes = {place: port.get_source_output().get_node() for place, port in ports.items()}
        if not suffix or any(node.get_type_name() != "Constant" for node in nodes.values()):
            continue
        begins, ends, characters, ids = (np.array(nodes[place].data) for place in ports)
        data = characters.tobytes()
        tokens = [data[begin:end] for begin, end in zip(begins, ends, strict=True)]
        tokens += [token + suffix for token in tokens]
        stops = np.cumsum([len(token) for token in tokens], dtype=ends.dtype)
        changed = {
            _BEGINS: np.concatenate([stops[:1] * 0, stops[:-1]]),
            _ENDS: stops,
            _CHARACTERS: np.frombuffer(b"".join(tokens), np.uint8).copy(),
            _IDS: np.concatenate([ids, ids]),
        }
        for place, value in changed.items():
            constant = ops.constant(value)
            constant.set_friendly_name(nodes[place].get_friendly_name())
            ports[place].replace_source_output(constant.output(0))
    model.validate_nodes_and_infer_types()
