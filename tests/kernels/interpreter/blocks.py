# SPDX-License-Identifier: Apache-2.0
"""Makes the kernels' blocks so small that every loop runs several times on a sample of a few dozen frames.

The tiles of a GPU hold 64 frames or more. With these, kernels walk over several blocks of rows, keys and channels, over
several parts of a sum and several pieces of a workspace, and masks hide something in the last of each.
"""

import triton.language as tl

from fastasr.kernels import (
    _hidden,
    _maps,
    _parts,
    _sliding_taps,
    balancer_gradient,
    batch_norm_activation,
    conv_subsampling,
    layer_norm_lstm,
    linear_activation,
    rel_attention,
    rnnt_joiner,
    rnnt_lattice,
    segment_attention,
    toeplitz_attention,
    whitening_gradient,
    zipformer_attention,
    zipformer_attention_weights,
)

BLOCK = 16  # the least that tl.dot takes
RELATIVE = rel_attention, zipformer_attention, zipformer_attention_weights
WITH_PARTS = _maps, _sliding_taps, conv_subsampling, layer_norm_lstm, linear_activation
WITH_PARTS += (toeplitz_attention,)


def _small(tiles):
    """Returns tile shapes, at any depth, with blocks of ``BLOCK``, and kernels that take no row at once. Tiles that are
    higher than wide stay so."""
    if isinstance(tiles, tuple):
        return tuple(map(_small, tiles))
    if not isinstance(tiles, dict):
        return tiles
    small = {name: BLOCK if name.startswith("BLOCK") else _small(value) for name, value in tiles.items()}
    if tiles.get("BLOCK_M", 0) > tiles.get("BLOCK_N", BLOCK):
        small["BLOCK_M"] = 2 * BLOCK
    return small | ({"WHOLE": False} if "WHOLE" in tiles else {})


class _Shrunk:
    def __init__(self, tiles):
        self.tiles = tiles

    def __call__(self, *sizes, **options):
        return _small(self.tiles(*sizes, **options))


def shrink(monkeypatch) -> None:
    """Shrinks the blocks of every kernel until ``monkeypatch`` is undone."""
    own = conv_subsampling, rnnt_joiner, segment_attention, toeplitz_attention, whitening_gradient
    for module in (*own, *RELATIVE):
        monkeypatch.setattr(module, "tiles", _Shrunk(module.tiles))
    for module in RELATIVE:
        monkeypatch.setattr(module, "head_block", lambda dim, dtype: BLOCK)
    for module in (rel_attention, toeplitz_attention):
        monkeypatch.setattr(module, "generation", lambda t: 90)
    for module in (rel_attention, zipformer_attention):
        monkeypatch.setattr(module, "PIECE_BYTES", 1)  # a block of queries at a time
    for module in WITH_PARTS:
        monkeypatch.setattr(module, "MAX_PARTS", 2)
    for module in (_parts, balancer_gradient, whitening_gradient):
        monkeypatch.setattr(module, "processors", lambda t: 2)
    monkeypatch.setattr(balancer_gradient, "BYTES", 512)
    monkeypatch.setattr(balancer_gradient, "PARTS", 2)
    monkeypatch.setattr(_hidden, "SCANNED", tl.constexpr(16))
    monkeypatch.setattr(batch_norm_activation, "ELEMENTS", 256)
    monkeypatch.setattr(batch_norm_activation, "PARTS", 2)
    monkeypatch.setattr(batch_norm_activation, "FORWARD", 8)
    monkeypatch.setattr(batch_norm_activation, "BACKWARD", 8)
    monkeypatch.setattr(whitening_gradient, "PART_ROWS", 16)
    monkeypatch.setattr(whitening_gradient, "RESIDENT", 8)
    monkeypatch.setattr(conv_subsampling, "LEAST_ROWS", 1)
    monkeypatch.setattr(rel_attention, "PROGRAMS", 1)  # the sequences are one group
    monkeypatch.setattr(rnnt_joiner, "CHUNK_BYTES", 1)  # a frame at a time
    monkeypatch.setattr(rnnt_joiner, "MAX_SHARES", 2)
    monkeypatch.setattr(rnnt_joiner, "FRAME", rnnt_joiner.FRAME | {"BLOCK_R": 2})
    monkeypatch.setattr(rnnt_joiner, "SHORT", 2)
    monkeypatch.setattr(rnnt_lattice, "MAX_LANES", 4)
