# SPDX-License-Identifier: Apache-2.0
"""The operations. Every module here without an underscore declares one op, or several that share their kernels.

Every op is also registered as ``torch.ops.fastasr.<name>``; ``fastasr ops`` prints which backends serve it here.
"""

import pkgutil
from importlib import import_module

from fastasr._nearest import no_attribute as _no_attribute
from fastasr.ops import _dispatch
from fastasr.ops._op import OPS

for _module in pkgutil.iter_modules(__path__):
    if not _module.name.startswith("_"):
        import_module(f"{__name__}.{_module.name}")
globals().update({name: op.function for name, op in OPS.items()})  # most replace the module of their name
# registers torch.ops.fastasr_cpu.*; where the library is missing, a table reports it instead of an exception
_dispatch.prepare()

NAMES = tuple(sorted(OPS))
# These ops compute gradients in another function's backward: they have no gradient themselves.
GRADIENTS = tuple(name for name, op in OPS.items() if op.is_gradient)
__all__ = list(NAMES)


def __getattr__(name: str):
    raise _no_attribute(__name__, name, __all__)


def __dir__() -> list[str]:
    return __all__
