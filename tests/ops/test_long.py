# SPDX-License-Identifier: Apache-2.0
"""Attention over 4,096 frames and recurrences over 2¹⁷ steps, values and gradients: errors do not grow with the length.

The two moving averages are checked at 2¹⁷ steps in test_ema_scan.py.
"""

from dataclasses import replace

import pytest
import torch

from fastasr import ops
from fastasr.testing import Make, tables
from fastasr.testing.checks import compared, values_and_gradients
from fastasr.testing.samples import (
    layer_norm_lstm,
    nonlin_attention,
    rel_attention,
    rnnt_lattice,
    rnnt_pruned_lattice,
    segment_attention,
    tdt_lattice,
    toeplitz_attention,
    zipformer_attention,
    zipformer_attention_weights,
)
from fastasr.testing.table import with_tensors

FRAMES, STEPS = 4096, 1 << 17


def _weights(make):
    return zipformer_attention_weights._call(make, FRAMES, 1, 1, 4, 2)


ATTENTION = {
    "nonlin_attention": lambda m: nonlin_attention._call(m, FRAMES, 1, 3),
    "rel_attention": lambda m: rel_attention._call(m, 1, FRAMES, 1, 4),
    "segment_attention": lambda m: segment_attention._call(m, 1, 1, 4, FRAMES, 64, 32, 8, 2),
    "toeplitz_attention": lambda m: toeplitz_attention._call(m, FRAMES, 1, 4, 3),
    "zipformer_attention": lambda m: zipformer_attention._valued(m, _weights(m)),
    "zipformer_attention_weights": _weights,
}
RECURRENCES = {
    "layer_norm_lstm": lambda m: layer_norm_lstm.lstm(m, STEPS, 1, 2, 8, eps=1.0),
    "rnnt_lattice": lambda m: rnnt_lattice._lattice(m, 1, 3, STEPS),
    "rnnt_pruned_lattice": lambda m: rnnt_pruned_lattice._band(m, 1, STEPS, 3, step=1),
    "tdt_lattice": lambda m: tdt_lattice._lattice(m, 1, STEPS, 3, (0, 1, 2)),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name):
    for what, comparison in compared(tables()[name], ATTENTION[name](Make()), torch.float32):
        # A single draw, of whose errors half are left out: the contract compares them closely, at small sizes.
        halved = replace(comparison, rms=comparison.rms / 2, worst=comparison.worst / 2)
        assert halved.ok, f"{what}: {comparison}"


@pytest.mark.parametrize("name", RECURRENCES)
def test_recurrence(name):
    """Compares with the kernel's own float64, since eager takes minutes. Errors of independent roundings grow with the
    root of the length.
    """
    function, arguments = tables()[name].function, RECURRENCES[name](Make())
    wide = with_tensors(arguments, lambda _, t: t.double())
    found, grads, cotangent = values_and_gradients(function, arguments)
    expected, expected_grads, _ = values_and_gradients(function, wide, cotangent)
    for what, ours in {"values": found, **grads}.items():
        reference = expected if what == "values" else expected_grads[what]
        error = (ours.double() - reference).norm() / reference.norm() / torch.finfo(torch.float32).eps
        assert error < STEPS**0.5, f"{what}: {error:.1f} units in the last place"


def test_every_attention_and_lattice_is_here():
    named = {name for name in ops.NAMES if name.endswith(("attention", "attention_weights", "lattice"))}
    assert named <= {*ATTENTION, *RECURRENCES}
