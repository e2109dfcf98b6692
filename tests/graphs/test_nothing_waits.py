# SPDX-License-Identifier: Apache-2.0
"""Recorded code asks no device for a value: checked on the meta device, which has none to give and is not the CPU,
whose branches could read values for nothing. (Fake CUDA tensors do not work in a torch for CPUs.)
"""

import contextlib
import functools
from unittest import mock

import pytest
import torch
from recorded_encoder import encoder
from test_zipformer_graphs import SIZES, at

from fastasr import PackedFrames
from fastasr._recording import recorded_by
from fastasr.graphs import Graphs
from fastasr.graphs.recording import Recording
from fastasr.models import e_branchformer, fast_conformer, zipformer
from fastasr.models.e_branchformer import EBranchformerEncoder
from fastasr.models.zipformer import Conv2dSubsampling, Zipformer


def _fast_conformer():
    return encoder(), (torch.randn(2, 40, 80), torch.ones(2, 40, dtype=torch.bool))


class OnRow(torch.nn.Module):
    """An encoder on a row of fixed length, with the moves of frames to it and back, of a batch or PackedFrames."""

    def __init__(self, encoder, row, packed, *more):
        super().__init__()
        self.encoder, self.row, self.packed, self.more = encoder, row, packed, more

    def forward(self, x, *masks):
        if self.packed:
            lengths = masks[0] if masks[0].dim() == 1 else masks[0].sum(1)
            rows = x.flatten(0, 1)
            x, masks = PackedFrames(rows, lengths), [mask if mask.dim() == 1 else None for mask in masks]
        options = Graphs(frames=80, recordings=3, longest=40)
        call = self.row.packed(self.encoder, options, x, *masks, *self.more)
        found = call.unpack(self.row.encoded(self.encoder, *call.arguments))
        return found[0] if isinstance(found[0], PackedFrames) else found


def _fast_conformer_on_row(packed):
    model, inputs = _fast_conformer()
    return OnRow(model, fast_conformer.row, packed, lambda hidden: hidden if packed else (hidden,)), inputs


def _zipformer_on_row(packed):
    model, inputs = _zipformer()
    return OnRow(model, zipformer.row, packed), inputs


def _zipformer():
    return at(Zipformer(**SIZES), 20000), (
        torch.randn(20, 2, 24),
        torch.tensor([20, 14]),
        torch.zeros(2, 20).bool(),
    )


def _front_end():
    return at(Conv2dSubsampling(80, 24), 20000), (torch.randn(2, 40, 80), torch.tensor([40, 33]))


def _front_end_on_row(packed):
    model, inputs = _front_end()
    return OnRow(model, zipformer.subsampling, packed), inputs


def _e_branchformer_on_row(packed):
    model = EBranchformerEncoder(80, 24, cgmlp_linear_units=32, num_blocks=2, use_ffn=True, macaron_ffn=True)
    return OnRow(model, e_branchformer.row, packed), (torch.randn(2, 40, 80), torch.tensor([40, 33]))


def _no(*_):
    return False


def _nothing(*_, **__):
    return contextlib.nullcontext()


@mock.patch.object(torch, "is_autocast_enabled", _no)  # which knows no meta device
@mock.patch.object(torch, "autocast", _nothing)
def recorded(model, inputs, train, recording=True):
    meta = torch.device("meta")
    for m in model.modules():
        if getattr(m, "pe", None) is not None:
            m.pe = m.pe.to(meta)
    model, inputs = model.train(train).to(meta), [t.to(meta) for t in inputs]
    ahead = Recording(meta, Recording(meta)) if recording else None
    with torch.set_grad_enabled(train), recorded_by(ahead):
        y = model(*inputs)[0]
    if train:
        torch.autograd.grad(y, list(model.parameters()), torch.empty_like(y), allow_unused=True)


BUILDS = (
    _fast_conformer,
    _zipformer,
    _front_end,
    *(
        functools.partial(build, packed)
        for build in (_fast_conformer_on_row, _zipformer_on_row, _front_end_on_row, _e_branchformer_on_row)
        for packed in (0, 1)
    ),
)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("build", BUILDS)
def test_a_recorded_pass_waits_for_nothing(build, train):
    recorded(*build(), train)


def test_the_check_sees_what_waits():
    with pytest.raises(RuntimeError, match="meta"):
        recorded(*_front_end(), False, recording=False)  # compares the lengths
