# SPDX-License-Identifier: Apache-2.0
"""Recognisers as ONNX files that onnxruntime and sherpa-onnx load. See docs/export.md."""

from fastasr.export.onnx_files import export_onnx

__all__ = ["export_onnx"]
