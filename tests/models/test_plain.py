# SPDX-License-Identifier: Apache-2.0
"""Parameters of a child are those that the child itself would read, wherever a wrapper keeps them."""

import pytest
import torch
from torch.func import functional_call
from torch.nn.utils import parametrizations, prune, weight_norm

from fastasr.models.common.plain import weight_and_bias


class Reads(torch.nn.Linear):
    """Returns ``function(self)``, to read parameters inside a call."""

    def forward(self, function):
        return function(self)


def as_attributes(module):
    """Replaces the parameters as FSDP does during a call."""
    for name in ("weight", "bias"):
        value = getattr(module, name).detach().clone()
        delattr(module, name)
        setattr(module, name, value)


def hide(module):
    """Puts a tensor before the parameter, which stays."""
    vars(module)["weight"] = module.weight.detach() + 1


CHANGES = {
    "plain": lambda module: None,
    "no bias": lambda module: setattr(module, "bias", None),
    "pruned": lambda module: prune.l1_unstructured(module, "weight", 2),
    "parametrization": parametrizations.weight_norm,
    "weight norm": weight_norm,
    "attributes": as_attributes,
    "hidden": hide,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("change", CHANGES)
def test_weight_and_bias(change):
    module = Reads(3, 4)
    CHANGES[change](module)
    weight, bias = weight_and_bias(module)
    assert torch.equal(weight, module.weight)
    assert bias is module.bias


def test_weight_and_bias_of_a_functional_call():
    module = Reads(3, 4)
    given = {"weight": torch.randn(4, 3), "bias": torch.randn(4)}
    weight, bias = functional_call(module, given, (weight_and_bias,))
    assert weight is given["weight"]
    assert bias is given["bias"]


def test_weight_and_bias_while_compiling():
    module = Reads(3, 4)

    @torch.compile(fullgraph=True, backend="eager")
    def call(x):
        weight, bias = weight_and_bias(module)
        return x @ weight.T + bias

    x = torch.randn(2, 3)
    for _ in range(2):
        assert torch.equal(call(x), x @ module.weight.T + module.bias)
        module.weight = torch.nn.Parameter(torch.randn(4, 3))  # read anew
