# SPDX-License-Identifier: Apache-2.0
"""Gradients at the ends of a clamp: of NaNs, of elements that equal a bound, and of bounds that are equal or cross."""

import math

import pytest
import torch

from fastasr.ops import add_norm, clamped_linear, norm_activation
from fastasr.testing import Make
from fastasr.testing.checks import values_and_gradients


def _agree(f, arguments):
    """Asserts that f has the definition's values and gradients, NaNs included."""
    found, expected = (values_and_gradients(g, arguments) for g in (f, f.definition))
    torch.testing.assert_close(found[0], expected[0], equal_nan=True)
    torch.testing.assert_close(found[1], expected[1], equal_nan=True)
    return found[1]


@pytest.mark.parametrize("limit", [0.0, 1.25, math.inf])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_a_norm_gives_a_nan_the_gradient_of_a_clamp(kind, limit):
    make = Make(torch.float32)
    x, weight = make.normal(3, 20), make.normal(20)
    x[1, 4] = math.nan
    gradients = _agree(norm_activation, {"x": x, "weight": weight, "kind": kind, "limit": limit})
    assert gradients["x"][0].isfinite().all()
    call = {"update": make.normal(3, 20), "weight": weight, "kind": kind, "update_weight": make.normal(20)}
    _agree(add_norm, call | {"x": x, "limit": limit})
    _agree(add_norm, call | {"x": make.normal(3, 20), "update": x, "update_limit": limit})


@pytest.mark.parametrize("activation", ["identity", "silu"])
@pytest.mark.parametrize("names", [(), ("output_min",), ("output_min", "output_max"), ("next_max",)])
def test_a_clamped_layer_gives_a_nan_the_gradient_of_a_clamp(names, activation):
    make = Make(torch.float32)
    bounds = {n: torch.tensor(-0.5 if n.endswith("min") else 0.75) for n in names}
    call = {"x": make.normal(3, 20), "weight": make.normal(5, 20), "activation": activation, **bounds}
    call["weight"][2, 7] = math.nan
    _agree(clamped_linear, call)


@pytest.mark.parametrize(("low", "high"), [(0.25, 0.25), (0.5, -0.5)])
def test_bounds_that_are_equal_or_cross_have_the_gradients_of_a_clamp(low, high):
    make = Make(torch.float32)
    for where in "input", "output", "next":
        bounds = {f"{where}_min": torch.tensor(low), f"{where}_max": torch.tensor(high)}
        gradients = _agree(clamped_linear, {"x": make.normal(6, 20), "weight": make.normal(5, 20), **bounds})
        assert gradients[f"{where}_max"] != 0


@pytest.mark.parametrize("ends", [("min",), ("max",), ("min", "max")])
def test_an_element_that_equals_its_bound_has_the_gradient_of_a_clamp(ends):
    values = {"min": -0.5, "max": 0.75}
    x = torch.tensor([[-0.5, 0.75, 0.0, 2.0], [0.75, -0.5, 1.0, -3.0]])
    for where in "input", "output", "next":
        bounds = {f"{where}_{end}": torch.tensor(values[end]) for end in ends}
        gradients = _agree(clamped_linear, {"x": x, "weight": torch.eye(4), **bounds})
        assert all(gradients[name] != 0 for name in bounds)
