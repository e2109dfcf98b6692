# SPDX-License-Identifier: Apache-2.0
"""A stand-in for k2.RaggedTensor, and icefall's AsrModel both ways. As a script it runs in a process of its own, since
icefall's recipe has modules named ``model`` and ``decoder``:

python icefall_loss.py egs/librispeech/ASR/zipformer    # prints the report's row and the largest relative error
"""

import random
import sys
import types

import torch

VOCABULARY, ENCODER, DECODER = 12, 24, 16


class Ragged:
    """What icefall reads of a k2.RaggedTensor with two axes."""

    def __init__(self, rows):
        self.rows = rows
        self.values = torch.tensor([label for row in rows for label in row], dtype=torch.int32)
        splits = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0).int()
        self.shape = types.SimpleNamespace(row_splits=lambda axis: splits)

    def pad(self, mode, padding_value):
        longest = max(map(len, self.rows))
        rows = [row + [padding_value] * (longest - len(row)) for row in self.rows]
        return torch.tensor(rows, dtype=torch.int32)


def recipe(folder):
    """Returns AsrModel, Decoder and Joiner of the folder, without k2, lhotse and the rest of icefall."""
    from fastasr.compat import k2

    utils, lhotse = types.ModuleType("icefall.utils"), types.ModuleType("lhotse.dataset")
    utils.add_sos = lambda y, sos_id: Ragged([[sos_id, *row] for row in y.rows])
    utils.make_pad_mask = utils.time_warp = lhotse.SpecAugment = None
    utils.torch_autocast = lambda enabled: torch.autocast("cpu", enabled=enabled)
    sys.modules |= {"k2": k2, "icefall": types.ModuleType("icefall"), "icefall.utils": utils}
    sys.modules |= {"lhotse": types.ModuleType("lhotse"), "lhotse.dataset": lhotse}
    sys.path.insert(0, folder)
    from decoder import Decoder
    from encoder_interface import EncoderInterface
    from joiner import Joiner
    from model import AsrModel

    torch.manual_seed(0)
    return AsrModel(
        EncoderInterface(),
        EncoderInterface(),
        Decoder(VOCABULARY, DECODER, blank_id=0, context_size=2),
        Joiner(ENCODER, DECODER, 20, VOCABULARY),
        encoder_dim=ENCODER,
        decoder_dim=DECODER,
        vocab_size=VOCABULARY,
    )


def both_ways(folder):
    """Returns the report's row and the largest error of losses and gradients, relative to each one's largest entry."""
    import fastasr

    model = recipe(folder)
    frames, lengths = torch.randn(3, 30, ENCODER), torch.tensor([30, 17, 9])
    y = Ragged([[3, 5, 2, 7, 7, 1], [], [4, 9, 11]])
    counts = y.shape.row_splits(1).diff()

    def step():
        model.zero_grad()
        random.seed(0)  # the decoder's balancers draw
        torch.manual_seed(0)
        losses = model.forward_transducer(frames, lengths, y, counts, 5, 0.1, 0.25)
        (0.5 * losses[0] + losses[1]).backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        return [*(loss.detach() for loss in losses), *grads]

    theirs = step()
    row = fastasr.accelerate(model, only=lambda path, module: path == "")[""]
    ours = step()
    errors = [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, theirs, strict=True)]
    return row, max(errors)


if __name__ == "__main__":
    row, error = both_ways(sys.argv[1])
    print(row.status, row.rule, error)
