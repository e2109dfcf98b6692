# SPDX-License-Identifier: Apache-2.0
"""The metadata of ONNX files. It has upstream's fields, by which sherpa-onnx recognises the model."""

from collections.abc import Iterable
from typing import Any

AUTHOR = {"version": "1", "model_author": "k2-fsa"}


def whole(ctc: bool) -> dict[str, str]:
    kind, comment = ("zipformer2_ctc", "zipformer2 CTC") if ctc else ("zipformer2", "zipformer2")
    return {"model_type": kind, **AUTHOR, "comment": f"non-streaming {comment}"}


def streaming(wrapper: Any, ctc: bool) -> dict[str, str]:
    """Returns the metadata of a streaming wrapper, with the sizes from which a runtime makes the first states."""
    encoder = wrapper.encoder

    def joined(values: Iterable) -> str:
        return ",".join(map(str, values))

    return {
        "model_type": "zipformer2",
        **AUTHOR,
        "comment": "streaming ctc zipformer2" if ctc else "streaming zipformer2",
        "decode_chunk_len": str(2 * wrapper.chunk_size),
        "T": str(2 * wrapper.chunk_size + wrapper.pad_length),
        "num_encoder_layers": joined(encoder.num_encoder_layers),
        "encoder_dims": joined(encoder.encoder_dim),
        "cnn_module_kernels": joined(encoder.cnn_module_kernel),
        "left_context_len": joined(
            wrapper.left_context_len // factor for factor in encoder.downsampling_factor
        ),
        "query_head_dims": joined(encoder.query_head_dim),
        "value_head_dims": joined(encoder.value_head_dim),
        "num_heads": joined(encoder.num_heads),
    }


def decoder(model: Any) -> dict[str, str]:
    found = model.decoder
    return {
        "context_size": str(found.context_size),
        "vocab_size": str(found.vocab_size),
        "blank_id": str(found.blank_id),
        "unk_id": str(getattr(model, "unk_id", found.blank_id)),
    }


def joiner(model: Any) -> dict[str, str]:
    return {"joiner_dim": str(model.joiner.output_linear.in_features)}
