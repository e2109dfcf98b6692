# SPDX-License-Identifier: Apache-2.0
"""The operations. Every module here without an underscore declares one op, or several that share their kernels.

Every op is also registered as ``torch.ops.fastasr.<name>``; ``fastasr ops`` prints which backends serve it here.
"""

import pkgutil
import warnings
from importlib import import_module

from fastasr.ops import _dispatch
from fastasr.ops._op import OPS

for _module in pkgutil.iter_modules(__path__):
    if not _module.name.startswith("_"):
        import_module(f"{__name__}.{_module.name}")
globals().update({name: op.function for name, op in OPS.items()})  # most replace the module of their name
# registers torch.ops.fastasr_cpu.*; where the library is missing, a table reports it instead of an exception
_dispatch.prepare()

NAMES = tuple(sorted(OPS))
# These ops compute gradients in another function's backward: they have no gradient themselves, and tests of their own.
GRADIENTS = tuple(name for name, op in OPS.items() if op.is_gradient)
__all__ = list(NAMES)

_RENAMED = {  # names of the previous release; the next one drops them
    "rel_position_attention": "zipformer_attention",
    "rel_position_attention_weights": "zipformer_attention_weights",
}


def __getattr__(name: str):
    if name not in _RENAMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"fastasr.ops.{name} is now fastasr.ops.{_RENAMED[name]}", DeprecationWarning, stacklevel=2)
    return globals()[_RENAMED[name]]
