# SPDX-License-Identifier: Apache-2.0
"""Explains why RETURNN's modules are not swapped. They are not ``torch.nn.Module``s. RETURNN wraps each of them in one
that holds the parameters, but calls the inner modules on its own tensors and never the wrappers of submodules."""

from fastasr.swap.rule import Upstream, upstream_class

_CONVERTED = ("EBranchformerLayer", "ConformerEncoder")
_NEVER_CALLED = (
    "computes on RETURNN's own tensors, so that a forward bound to this wrapper would never be called"
)


def reason(module: Upstream) -> str | None:
    """Returns a reason if the module is RETURNN's wrapper of its own module, else None."""
    if upstream_class(module).__name__ != "RFModuleAsPTModule":
        return None
    name = type(getattr(module, "_rf_module", None)).__name__
    text = f"RETURNN's {name} {_NEVER_CALLED}"
    if name in _CONVERTED:
        text += "; fastasr.models.e_branchformer.from_returnn(module) converts it"
    return text


def is_module(value: object) -> bool:
    """Says whether this is a module of RETURNN without the wrapper."""
    return any(cls.__module__.startswith("returnn.frontend") for cls in type(value).__mro__)
