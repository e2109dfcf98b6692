# SPDX-License-Identifier: Apache-2.0
"""Recognisers made of the kernels and encoders: training, decoding, live streaming, ONNX files (extra ``asr``).

``recogniser``: the model around an encoder. ``decoding``: searches. ``streaming``: live recognition. ``export``: ONNX
files. ``audio``: recordings and their features. ``recipe``: training. ``demo``: ``python -m fastasr.asr.demo``. Nothing
outside this package, the commands and the benchmarks imports it.
"""

from importlib import import_module
from typing import Any

from fastasr._nearest import no_attribute as _no_attribute

__all__ = ["audio", "decoding", "demo", "export", "recipe", "recogniser", "streaming"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return import_module(f"{__name__}.{name}")
    raise _no_attribute(__name__, name, __all__)


def __dir__() -> list[str]:
    return __all__
