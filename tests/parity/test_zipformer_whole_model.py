# SPDX-License-Identifier: Apache-2.0
"""The whole recogniser against the ``zipformer`` package: states, losses, gradients, draws; fast_rnnt stands for k2."""

import random

import pytest
import torch
from steps import close, draws, moved, same_tree, seeded, set_batch_count
from upstream_precision import computing_in

pytest.importorskip("zipformer", reason="upstream's package is not installed")

import atdataset
import numpy
import tiny_asr
from zipformer.modules import attention_decoder as their_attention
from zipformer.modules import model as theirs
from zipformer.modules.label_smoothing import LabelSmoothingLoss
from zipformer.utils import make_pad_mask

from fastasr.asr import recogniser
from fastasr.models.common import sequences


@pytest.fixture(autouse=True)
def _upstreams_losses(monkeypatch):
    """Lets upstream's losses call fast_rnnt for k2 where it is built."""
    try:
        import fast_rnnt
    except ImportError:
        fast_rnnt = None
    monkeypatch.setattr(theirs, "k2", fast_rnnt)
    monkeypatch.setattr(theirs, "time_warp", _time_warp)


def _twins(config):
    seeded(0)
    their_model = moved(theirs.AsrModel(**config), 0.05, 3)
    our_model = recogniser.AsrModel(**config)
    our_model.load_state_dict(their_model.state_dict(), strict=True)
    return [set_batch_count(m, 20000.0).train() for m in (our_model, their_model)]


@pytest.mark.parametrize("config", tiny_asr.CONFIGS.values(), ids=tiny_asr.CONFIGS)
def test_same_modules_same_initial_state_same_draws(config):
    made = []
    for module in (recogniser, theirs):
        seeded(5)
        made.append((module.AsrModel(**config), draws()))
    assert made[0][1] == made[1][1]
    same_tree(made[0][0], made[1][0])


def _step(model, inputs, **arguments):
    seeded(2)
    numpy.random.seed(2)
    model.zero_grad()
    x, lengths, tokens = inputs
    losses = model(x, lengths, [list(t) for t in tokens], **arguments)
    sum(
        (weight * loss).sum() for weight, loss in zip((0.5, 1, 0.3, 0.7, 0.2), losses, strict=True)
    ).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return [loss.detach() for loss in losses], gradients, (draws(), numpy.random.rand())


def _time_warp(x, time_warp_factor, supervision_segments):
    """Lets upstream's code call the time warp by an argument name that the installed atdataset has renamed."""
    assert not supervision_segments[:, 1].any()
    lengths = supervision_segments[:, 2]
    return atdataset.time_warp(x, time_warp_factor=time_warp_factor, feature_lens=lengths)


def _masked(**more):
    """Returns the options of CR-CTC as recipes use it: both copies are warped as one, each has masks of its own."""
    masks = theirs.SpecAugment(
        time_warp_factor=0,
        num_frame_masks=2,
        features_mask_size=5,
        num_feature_masks=2,
        frames_mask_size=12,
        max_frames_mask_fraction=0.3,
        p=1.0,
    )
    segments = torch.tensor([[n, 0, length] for n, length in enumerate(tiny_asr.LENGTHS)])
    return {
        "use_cr_ctc": True,
        "use_spec_aug": True,
        "spec_augment": masks,
        "supervision_segments": segments,
        "time_warp_factor": 10,
        **more,
    }


_CASES = {
    "transducer": (tiny_asr.TRANSDUCER, {}),
    "transducer, smoothed": (tiny_asr.TRANSDUCER, {"am_scale": 0.1, "lm_scale": 0.25, "prune_range": 3}),
    "transducer, mean": (tiny_asr.TRANSDUCER, {"reduction": "mean"}),
    "CTC": (tiny_asr.CTC, {}),
    "CTC, mean": (tiny_asr.CTC, {"reduction": "mean"}),
    "CR-CTC": (tiny_asr.CTC, {"use_cr_ctc": True}),
    "CR-CTC, mean": (tiny_asr.CTC, {"use_cr_ctc": True, "reduction": "mean"}),
    "all": (tiny_asr.ALL, {}),
    "all, CR-CTC": (tiny_asr.ALL, {"use_cr_ctc": True}),
    "CR-CTC, masks and time warp": (tiny_asr.CTC, _masked()),
    "CR-CTC, masks, mean": (tiny_asr.CTC, _masked(time_warp_factor=None, reduction="mean")),
    "all, CR-CTC, masks and time warp": (tiny_asr.ALL, _masked()),
    "streaming": (tiny_asr.STREAMING, {}),
    "streaming, CR-CTC, masks and time warp": (tiny_asr.STREAMING, _masked()),
}


@pytest.mark.parametrize(("config", "arguments"), _CASES.values(), ids=_CASES)
def test_a_training_step(config, arguments):
    if config.get("use_transducer", True) and theirs.k2 is None:
        pytest.skip("fast_rnnt is not built here: scripts/install_peers.sh")
    results = [_step(model, tiny_asr.batch(), **arguments) for model in _twins(config)]
    (our_losses, our_gradients, our_draws), (their_losses, their_gradients, their_draws) = results
    assert our_draws == their_draws
    torch.testing.assert_close(our_losses, their_losses, rtol=1e-5, atol=1e-5)
    assert our_gradients.keys() == their_gradients.keys()
    floor = 1e-7 * float(torch.stack([g.norm() for g in their_gradients.values()]).norm())
    for name, expected in their_gradients.items():
        error = float((our_gradients[name] - expected).norm())
        assert error <= 2e-5 * float(expected.norm()) + floor, name


def test_encoder_output_and_lengths():
    our_model, their_model = _twins(tiny_asr.STREAMING)
    x, lengths, _ = tiny_asr.batch()
    with torch.inference_mode():
        y, y_lens = our_model.eval().forward_encoder(x, lengths)
        expected, expected_lens = their_model.eval().forward_encoder(x, lengths)
    assert torch.equal(y_lens, expected_lens)
    close(y, expected, 1e-5)


# --------------------------------------------------------------------------- parts
@pytest.mark.parametrize("context", [1, 2, 3])
@pytest.mark.parametrize("need_pad", [True, False])
def test_decoder(context, need_pad):
    seeded(0)
    their_decoder = theirs.Decoder(11, 8, 0, context).eval()
    our_decoder = recogniser.Decoder(11, 8, 0, context).eval()
    our_decoder.load_state_dict(their_decoder.state_dict(), strict=True)
    y = torch.tensor([[-1] * (context - 1) + [0], list(range(1, context + 1))])
    if need_pad:
        y = torch.cat([y, y], dim=1)
    torch.testing.assert_close(our_decoder(y, need_pad), their_decoder(y, need_pad))


def test_joiner():
    their_joiner, our_joiner = theirs.Joiner(6, 5, 7, 9), recogniser.Joiner(6, 5, 7, 9)
    our_joiner.load_state_dict(their_joiner.state_dict(), strict=True)
    a, b = torch.randn(2, 3, 1, 6), torch.randn(2, 1, 4, 5)
    torch.testing.assert_close(our_joiner(a, b), their_joiner(a, b))
    a, b = torch.randn(2, 7), torch.randn(2, 7)
    torch.testing.assert_close(our_joiner(a, b, project_input=False), their_joiner(a, b, project_input=False))


@pytest.mark.parametrize("scale", [1.0, 40.0], ids=["usual scores", "scores beyond the limit"])
@pytest.mark.parametrize("masks", ["none", "padding", "attention", "both"])
def test_attention(masks, scale):
    """Values and gradients agree, those of the penalty on large scores included."""
    seeded(0)
    their_attn = their_attention.MultiHeadAttention(12, 16, 4, memory_dim=10).double()
    our_attn = recogniser.MultiHeadAttention(12, 16, 4, memory_dim=10).double()
    our_attn.load_state_dict(their_attn.state_dict(), strict=True)
    query = scale * torch.randn(5, 3, 12, dtype=torch.float64)
    memory = scale * torch.randn(7, 3, 10, dtype=torch.float64)
    kwargs = {}
    if masks in ("padding", "both"):
        kwargs["key_padding_mask"] = make_pad_mask(torch.tensor([7, 4, 2]))
    if masks in ("attention", "both"):
        kwargs["attn_mask"] = torch.rand(3, 5, 7) > 0.7
        kwargs["attn_mask"][:, :, 0] = False
    results = []
    for attention in (our_attn, their_attn):
        leaves = [query.clone().requires_grad_(), memory.clone().requires_grad_()]
        random.seed(3)
        with computing_in(torch.float64):
            out = attention(leaves[0], leaves[1], leaves[1], **kwargs)
            (out.sin()).sum().backward()
        grads = [leaf.grad for leaf in leaves] + [p.grad for p in attention.parameters()]
        results.append(([out.detach(), *grads], random.getstate()))
    assert results[0][1] == results[1][1]
    close(results[0][0], results[1][0], 1e-9, least=0.1)


@pytest.mark.parametrize("width", [8, 12])
def test_positional_encoding(width):
    our_pe = recogniser.PositionalEncoding(width, 0.1, max_len=4).eval()
    their_pe = their_attention.PositionalEncoding(width, 0.1, max_len=4).eval()
    for length in (3, 9):
        x = torch.randn(2, length, width)
        torch.testing.assert_close(our_pe(x), their_pe(x))
    assert torch.equal(our_pe.pe, their_pe.pe)


def test_attention_decoder_losses():
    seeded(0)
    arguments = {"num_decoder_layers": 2, "attention_dim": 8, "num_heads": 2, "feedforward_dim": 12}
    arguments |= {"decoder_dim": 8, "memory_dim": 6, "sos_id": 1, "eos_id": 2}
    their_model = their_attention.AttentionDecoderModel(11, **arguments).eval()
    our_model = recogniser.AttentionDecoderModel(11, **arguments).eval()
    our_model.load_state_dict(their_model.state_dict(), strict=True)
    memory, lengths = torch.randn(3, 9, 6), torch.tensor([9, 4, 6])
    for reduction in ("sum", "none"):
        loss, expected = (
            m.calc_att_loss(memory, lengths, tiny_asr.TOKENS, reduction) for m in (our_model, their_model)
        )
        torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(m.nll(memory, lengths, tiny_asr.TOKENS) for m in (our_model, their_model)))


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_label_smoothing(reduction, smoothing):
    x, target = torch.randn(2, 4, 6), torch.tensor([[1, 2, 0, -1], [5, -1, -1, -1]])
    torch.testing.assert_close(
        *(
            cls(-1, smoothing, reduction)(x, target)
            for cls in (recogniser.LabelSmoothingLoss, LabelSmoothingLoss)
        )
    )


def test_swish_and_subsequent_mask():
    x = torch.randn(50) * 5
    torch.testing.assert_close(recogniser.Swish()(x), their_attention.Swish()(x))
    for size in (0, 1, 5):
        assert torch.equal(sequences.subsequent_mask(size), their_attention.subsequent_mask(size))


def test_masks_and_time_warp_change_what_is_learned():
    """The cases above compare augmented batches: without masks, and without the warp, the losses differ."""
    (our_model, _) = _twins(tiny_asr.CTC)
    inputs = tiny_asr.batch()
    losses = [
        float(_step(our_model, inputs, **arguments)[0][2])
        for arguments in ({"use_cr_ctc": True}, _masked(time_warp_factor=None), _masked())
    ]
    assert len({round(loss, 3) for loss in losses}) == 3
