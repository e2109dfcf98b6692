# SPDX-License-Identifier: Apache-2.0
"""Why RETURNN's modules are not swapped. They are no ``torch.nn.Module``: RETURNN wraps each in one that holds its
parameters, and calls the modules inside, on its own tensors, without ever calling the wrappers of the submodules."""

from fastasr.swap.rule import upstream_class

_CONVERTED = ("EBranchformerLayer", "ConformerEncoder")
_NEVER_CALLED = (
    "computes on RETURNN's own tensors, so that a forward bound to this wrapper would never be called"
)


def reason(module):
    """A reason against RETURNN's wrapper of a module of its own, and None for any other module."""
    if upstream_class(module).__name__ != "RFModuleAsPTModule":
        return None
    name = type(getattr(module, "_rf_module", None)).__name__
    text = f"RETURNN's {name} {_NEVER_CALLED}"
    if name in _CONVERTED:
        text += "; fastasr.models.e_branchformer.from_returnn(module) converts it"
    return text


def is_module(value):
    """Whether this is a module of RETURNN's, not wrapped."""
    return any(cls.__module__.startswith("returnn.frontend") for cls in type(value).__mro__)
