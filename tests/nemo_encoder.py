# SPDX-License-Identifier: Apache-2.0
"""NeMo's Conformer encoder without NeMo's dependencies.

``import nemo.collections.asr`` asks for some eighty packages, for training, data and telemetry. The encoder's own files
use torch, so they are imported alone here: without the ``__init__`` of the packages around them, and with empty classes
in place of what is not installed. The code of the encoder and of all its layers is NeMo's.
"""

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import sys
import types

import pytest
import torch

_WITHOUT_INIT = (
    "nemo.collections",
    "nemo.collections.asr",
    "nemo.collections.asr.losses",
    "nemo.collections.asr.models",
    "nemo.collections.asr.modules",
    "nemo.collections.asr.modules.transformer",
    "nemo.collections.asr.parts",
    "nemo.collections.asr.parts.mixins",
    "nemo.collections.asr.parts.submodules.adapters",
    "nemo.collections.asr.parts.utils",
    "nemo.collections.common",
    "nemo.core.classes",
)
_ABSENT = (
    "einops",
    "hydra",
    "lightning",
    "omegaconf",
    "nemo.collections.asr.models.configs",
    "nemo.collections.asr.parts.utils.rnnt_utils",
    "nemo.core.classes.exportable",
    "nemo.core.config",
    "nemo.core.connectors",
    "nemo.core.utils.process_launcher",
    "nemo.utils.lightning_logger_patch",
)

# what the packages' __init__ would define: package, module, name
_REEXPORTED = (
    ("nemo.core.classes", "nemo.core.classes.exportable", "Exportable"),
    ("nemo.core.classes", "nemo.core.classes.loss", "Loss"),
    ("nemo.core.classes", "nemo.core.classes.module", "NeuralModule"),
    ("nemo.core.classes", "nemo.core.classes.common", "typecheck"),
    ("nemo.core.classes", "nemo.core.classes.mixins.adapter_mixins", "adapter_mixins"),
    ("nemo.core", "nemo.core.classes.module", "NeuralModule"),
)


class _EmptyClasses(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (dict,) if name == "DictConfig" else (), {})
        setattr(self, name, made)
        return made


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if any(f"{name}.".startswith(f"{absent}.") for absent in _ABSENT):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _EmptyClasses(spec.name)

    def exec_module(self, module):
        pass


@contextlib.contextmanager
def _stand_ins(root):
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    for name in _WITHOUT_INIT:
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = ["/".join([root, *name.split(".")[1:]])]
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name, module in list(sys.modules.items()):
            if isinstance(module, _EmptyClasses):
                del sys.modules[name]


def load():
    """Returns the module ``nemo.collections.asr.modules.conformer_encoder``; skips the test without nemo_toolkit."""
    return _load("nemo.collections.asr.modules.conformer_encoder")


def load_transformer():
    """Returns the module ``nemo.collections.asr.modules.transformer_encoder``, with a dense FlexAttention: on a CPU
    torch's has no gradient. It stays in the module as ``of_torch``."""
    module = _load("nemo.collections.asr.modules.transformer_encoder")
    if not hasattr(module, "of_torch"):
        module.of_torch, module.flex_attention = module.flex_attention, _dense
    return module


def _dense(q, k, v, block_mask=None, score_mod=None):
    batch, heads, query, key = (torch.arange(n, dtype=torch.int64) for n in (*q.shape[:3], k.shape[2]))
    indices = batch[:, None, None, None], heads[:, None, None], query[:, None], key
    scores = (q @ k.transpose(2, 3)) * q.shape[-1] ** -0.5
    scores = scores if score_mod is None else score_mod(scores, *indices)
    if block_mask is None:
        return scores.softmax(-1) @ v
    sees = block_mask.mask_mod(*indices)
    weights = scores.masked_fill(~sees, torch.finfo(scores.dtype).min).softmax(-1)
    return weights.masked_fill(~sees, 0.0) @ v


def load_transducer():
    """Returns the modules ``nemo.collections.asr.modules.rnnt`` and ``nemo.collections.asr.losses.rnnt``."""
    return _load("nemo.collections.asr.modules.rnnt"), _load("nemo.collections.asr.losses.rnnt")


def load_decoder():
    """Returns the modules of Canary's decoder and its searches, ``nemo.collections.asr.modules.transformer...``."""
    names = "transformer_decoders", "transformer_modules", "transformer_generators"
    return [_load(f"nemo.collections.asr.modules.transformer.{name}") for name in names]


def _load(name):
    if name not in sys.modules:
        nemo = pytest.importorskip("nemo")
        with _stand_ins(nemo.__path__[0]):
            sys.modules["nemo.core.utils.k2_guard"] = None  # to import it raises ImportError, as without k2
            for package, path, attribute in _REEXPORTED:
                module = importlib.import_module(path)
                setattr(importlib.import_module(package), attribute, getattr(module, attribute, module))
            importlib.import_module(name)
    return sys.modules[name]
