# SPDX-License-Identifier: Apache-2.0
"""Imports of the upstream packages that are measured beside fastasr."""

import importlib
from types import ModuleType

# package -> how to install it
INSTALL = {
    **dict.fromkeys(
        ("zipformer", "espnet2", "torchaudio", "nemo", "speechbrain", "transformers", "fireredasr", "gigaam"),
        'docs/install.md has the lines of pip for it, under "Frameworks"',
    ),
    "zipvoice": "the package on PyPI is empty; put a checkout of k2-fsa/ZipVoice on PYTHONPATH",
    "fast_rnnt": "python scripts/build_fast_rnnt.py SOURCES",
    "ctranslate2": "pip install ctranslate2",
    "onnx": "pip install 'fastasr[asr]'",
    "onnxruntime": "pip install 'fastasr[asr]'",
}


class MissingUpstream(ImportError):
    """A package that is measured beside fastasr cannot be imported."""


def module(name: str) -> ModuleType:
    """Returns the module of this dotted name, of a package in INSTALL. Raises ``MissingUpstream`` with how to install
    it.
    """
    package = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, AttributeError) as error:
        raise MissingUpstream(
            f"upstream's package {package} cannot be imported ({error}); {INSTALL[package]}"
        ) from None
