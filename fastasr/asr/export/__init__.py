# SPDX-License-Identifier: Apache-2.0
"""Recognisers as ONNX files that onnxruntime and sherpa-onnx load. See docs/export.md."""

from fastasr.asr.export.onnx_files import export_onnx
from fastasr.asr.export.onnx_models import (
    OnnxCtcModel,
    OnnxStreamingCtcModel,
    OnnxStreamingTransducerModel,
    OnnxTransducerModel,
)
from fastasr.asr.export.wrappers import (
    EncoderWrapper,
    OnnxCtcWrapper,
    OnnxDecoderWrapper,
    OnnxEncoderWrapper,
    OnnxJoinerWrapper,
    OnnxStreamingCtcWrapper,
    OnnxStreamingEncoderWrapper,
    StreamingEncoderWrapper,
)

__all__ = [
    "EncoderWrapper",
    "OnnxCtcModel",
    "OnnxCtcWrapper",
    "OnnxDecoderWrapper",
    "OnnxEncoderWrapper",
    "OnnxJoinerWrapper",
    "OnnxStreamingCtcModel",
    "OnnxStreamingCtcWrapper",
    "OnnxStreamingEncoderWrapper",
    "OnnxStreamingTransducerModel",
    "OnnxTransducerModel",
    "StreamingEncoderWrapper",
    "export_onnx",
]
