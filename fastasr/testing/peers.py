# SPDX-License-Identifier: Apache-2.0
"""Imports of the upstream packages that are measured beside fastasr."""

import importlib

# how to install what ``module`` imports
INSTALL = {
    "zipformer": "pip install --no-deps zipformer==0.1.3, and what it imports",
    "espnet2": "pip install --no-deps espnet==202511, and what it imports",
    "torchaudio": "pip install --no-deps torchaudio==2.11.0",
    "nemo": "pip install --no-deps nemo_toolkit==3.0.0",
    "speechbrain": "pip install --no-deps speechbrain==1.1.2, and what it imports",
    "transformers": "pip install transformers==5.23.0",
    "fast_rnnt": "python scripts/build_fast_rnnt.py SOURCES",
    "onnx": "pip install 'fastasr[export]'",
    "onnxruntime": "pip install 'fastasr[export]'",
}


class MissingUpstream(ImportError):
    """A package that is measured beside fastasr cannot be imported."""


def module(name: str):
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
