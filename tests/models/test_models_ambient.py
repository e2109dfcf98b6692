# SPDX-License-Identifier: Apache-2.0
"""What our models, searches, losses, streams and features compute does not depend on torch's default dtype and default
device. A model that was built in another setting computes the same once it has the weights."""

import copy
import importlib
import pkgutil

import ambient
import pytest
import tiny_emformer_rnnt
import torch
from steps import moved, numbers, seeded
from tiny_recogniser import RECOGNISER, STREAMING, WHOLE

from fastasr import models, rnnt
from fastasr.asr import decoding, export, recogniser, streaming
from fastasr.asr.audio import features, recordings
from fastasr.models import e_branchformer, emformer, emformer_rnnt, fast_conformer, mega, zipformer
from fastasr.models.e_branchformer import returnn
from fastasr.models.mega import activations, normalizations

TOKENS = [[3, 5, 5, 2, 9], [7, 1, 1], [4, 4]]
ENDS = torch.tensor([75, 61, 40])
LONG = torch.tensor([700, 300])  # frames for which a table of 16 bits has no exact positions


def drawn(*shape):
    return torch.randn(shape, generator=numbers(1))


def frames_and_mask(lengths, width):
    x = drawn(len(lengths), int(lengths.max()), width)
    return x, (torch.arange(x.shape[1]) < lengths[:, None]).long()


def zipformer_losses():
    def make():
        return recogniser.AsrModel(
            **RECOGNISER | WHOLE,
            feature_dim=20,
            vocab_size=12,
            use_ctc=True,
            use_attention_decoder=True,
            attention_decoder_dim=16,
            attention_decoder_attention_dim=16,
            attention_decoder_num_heads=2,
            attention_decoder_feedforward_dim=24,
            label_smoothing=0.1,
        )

    x = drawn(3, 75, 20)
    return make, lambda model: model(x, ENDS, TOKENS)


def long_zipformer():
    config = {
        "encoder_dim": (24, 32),
        "encoder_unmasked_dim": (24, 24),
        "feedforward_dim": 32,
        "num_heads": 2,
    }
    sizes = {"query_head_dim": 8, "pos_head_dim": 4, "value_head_dim": 6, "pos_dim": 16}

    def make():
        return zipformer.Zipformer(
            downsampling_factor=(1, 2), num_encoder_layers=1, cnn_module_kernel=7, **config, **sizes
        )

    x = drawn(1100, 1, 24)  # longer than the first table
    return make, lambda model: model(x, torch.tensor([1100], device="cpu"))[0]


def zipformer_without_padding():
    make, _ = zipformer_losses()
    x = drawn(3, 75, 20)

    def run(model):
        model.encoder.ragged = True
        return model.forward_encoder(x, ENDS)

    return make, run


def streaming_zipformer():
    def make():
        return recogniser.AsrModel(**RECOGNISER | STREAMING, feature_dim=20, vocab_size=12, use_ctc=True)

    x = drawn(2, 77, 20)

    def run(model):
        wrapper = export.StreamingEncoderWrapper(model.encoder, model.encoder_embed)
        size, states, found = wrapper.chunk_size * 2, wrapper.get_init_states(2), []
        for begin in range(0, 48, size):
            chunk = x[:, begin : begin + size + 13]
            y, lengths, states = wrapper(chunk, torch.full((2,), chunk.shape[1], device="cpu"), states)
            found += [y, lengths]
        return found

    return make, run


def searches():
    make, _ = streaming_zipformer()
    x, lengths = 2 * drawn(2, 20, 24), torch.tensor([20, 13])

    def run(model):
        with torch.no_grad():
            log_probs = model.ctc_output(x)
            found = [
                decoding.greedy_search(model, x, lengths),
                decoding.modified_beam_search(model, x, lengths, beam=3),
                decoding.ctc_greedy_search(log_probs, lengths),
                decoding.ctc_prefix_beam_search(log_probs, lengths, beam=3),
            ]
        return [(result.tokens, result.timestamps, result.scores) for result in found]

    return make, run


def streams(backend):
    def family():
        make, _ = streaming_zipformer()
        chunks = drawn(3, 2, 29, 20)

        def run(model):
            with torch.inference_mode():
                encoder = streaming.StreamingEncoder.from_model(
                    model, chunk_size=8, left_context_frames=16, backend=backend, max_streams=2, bins=20
                )
                opened = [encoder.open(), encoder.open()]
                return [
                    encoder.step(chunk, opened, lengths) for chunk in chunks for lengths in (None, [29, 20])
                ]

        return make, run

    family.__name__ = f"{backend}_streams"
    return family


def e_branchformer_encoder():
    x, _ = frames_and_mask(LONG, 20)

    def make():
        return e_branchformer.EBranchformerEncoder(
            *(20, 24, 3),
            cgmlp_linear_units=36,
            cgmlp_conv_kernel=7,
            num_blocks=2,
            linear_units=28,
            use_ffn=True,
            macaron_ffn=True,
        )

    return make, lambda model: model(x, LONG)[0]


def e_branchformer_stack():
    x = drawn(2, 700, 24)

    def make():
        layer = {"ff_dim": 28, "num_heads": 3, "cgmlp_ff_dim": 18, "cgmlp_conv_kernel": 7}
        layers = [e_branchformer.EBranchformerLayer(24, **layer) for _ in range(2)]
        return returnn.EBranchformerStack(layers)

    return make, lambda model: model(x, None)


def parts():
    """The classes that the other models here do not have."""
    x = drawn(2, 30, 8)

    def make():
        made = [activations.FTSwish(), activations.Smish(), activations.Swish(1.5)]
        made += [normalizations.BasicNorm(8), normalizations.RMSNorm(8), normalizations.ScaleNorm(8)]
        return torch.nn.ModuleList([*made, e_branchformer.Merge(in_dim1=8, in_dim2=8, out_dim=4)])

    return make, lambda model: [*(part(x) for part in model[:-1]), model[-1](x, x)]


def emformer_encoder():
    x, lengths = drawn(3, 23, 12), torch.tensor([21, 15, 9])
    chunks, ends = drawn(4, 3, 6, 12), torch.tensor([6, 6, 4])

    def make():
        return emformer.Emformer(
            12, 3, 20, 2, 4, left_context_length=5, right_context_length=2, max_memory_size=2
        )

    def run(model):
        found, states = [model(x, lengths)], None
        for chunk in chunks:
            y, n, states = model.infer(chunk, ends, states)
            found.append((y, n))
        return found

    return make, run


def torchaudio_rnnt():
    x, lengths = drawn(2, 44, 6), torch.tensor([40, 31], dtype=torch.int32)
    targets = torch.tensor([[1, 2, 3], [4, 5, 0]], dtype=torch.int32)
    target_lengths = torch.tensor([3, 2], dtype=torch.int32)

    def run(model):
        found = [model.loss(x, lengths, targets, target_lengths)]
        with torch.no_grad():
            search = decoding.RNNTBeamSearch(model, 8)
            found += [h[0::3] for h in search(x[:1], lengths[:1], 3)]
        return found

    return lambda: tiny_emformer_rnnt.tiny(emformer_rnnt), run


def _fast_conformer():
    return fast_conformer.FastConformerEncoder(
        mel_bins=16, width=24, layers=2, heads=3, hidden=40, taps=5, channels=8
    )


def fast_conformer_ctc():
    x, mask = frames_and_mask(torch.tensor([2500, 60]), 16)
    return lambda: fast_conformer.FastConformerCTC(_fast_conformer(), 12), lambda model: model(x, mask)


def fast_conformer_without_padding():
    x, mask = frames_and_mask(LONG, 16)

    def run(model):
        model.ragged = True
        return model(x, mask)

    return _fast_conformer, run


def fast_conformer_transducer(kind):
    def family():
        x, mask = frames_and_mask(torch.tensor([203, 150]), 16)
        labels, label_lengths = torch.tensor([[3, 5, 2], [7, 1, 0]]), torch.tensor([3, 2])

        def run(model):
            found = [model.loss(x, mask, labels=labels, label_lengths=label_lengths)]
            with torch.no_grad():
                y, valid = model.encoder(x, mask)
                return [*found, decoding.parakeet_generate(model, y, valid.sum(1))]

        return lambda: kind(_fast_conformer(), 12, hidden=10), run

    family.__name__ = kind.__name__
    return family


def mega_decoder(bias, chunk_size):
    sizes = {"block_size": 16, "linear_size": 24, "qk_size": 8, "v_size": 20, "num_heads": 2}
    options = {"rel_pos_bias_type": bias, "chunk_size": chunk_size, "num_blocks": 2, "max_positions": 400}

    def family():
        labels = torch.randint(1, 12, (2, 300), generator=numbers(1))

        def run(model):
            found, states = [model(labels)], model.init_state()
            with torch.no_grad():
                for t in range(1, 6):
                    y, states = model.score(labels[0, :t].tolist(), states)
                    found.append(y)
                hypotheses = [labels[0, :3].tolist(), labels[1, :2].tolist()]
                kept = [model.score(h, model.init_state())[1] for h in hypotheses]
                found.append(model.inference(labels[:, :1], model.create_batch_states(kept)))
            return found

        return lambda: mega.MEGADecoder(12, **sizes, **options), run

    family.__name__ = f"mega_{bias}_{chunk_size}"
    return family


FAMILIES = [
    *(zipformer_losses, long_zipformer, zipformer_without_padding, streaming_zipformer, searches),
    *(streams("native"), streams("eager")),
    *(e_branchformer_encoder, e_branchformer_stack, emformer_encoder, torchaudio_rnnt, parts),
    *(fast_conformer_ctc, fast_conformer_without_padding),
    *map(fast_conformer_transducer, (fast_conformer.FastConformerRNNT, fast_conformer.FastConformerTDT)),
    *(mega_decoder(bias, size) for bias in ("simple", "rotary") for size in (-1, 4)),
]
families = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)


def built(make):
    seeded(0)
    return moved(make(), 0.1).eval()


@families
def test_the_same_in_every_setting(family):
    make, run = family()
    ambient.same_model_everywhere(built(make), run)


@families
def test_a_model_built_in_another_setting(family):
    make, run = family()
    model = built(make)
    expected = ambient.outcome(lambda: run(copy.deepcopy(model)))
    for setting in ambient.SETTINGS:
        with ambient.ambient(setting):
            other = make().eval()
        other.to_empty(device="cpu") if isinstance(setting, torch.device) else other.float()
        other.load_state_dict(model.state_dict())
        text = ambient.difference(ambient.outcome(lambda other=other: run(other)), expected)
        assert not text, f"built under {setting}: {text}"


def test_every_class_is_there():
    for found in pkgutil.walk_packages(models.__path__, "fastasr.models."):
        importlib.import_module(found.name)
    left, missing = [torch.nn.Module], set()
    while left:
        left += (children := left.pop().__subclasses__())
        missing |= {child for child in children if child.__module__.startswith("fastasr.models.")}
    for family in FAMILIES:
        missing -= {type(module) for module in family()[0]().modules()}
    assert not missing, f"no model here has {sorted(c.__name__ for c in missing)}"


def test_losses():
    am, lm, symbols = drawn(2, 9, 7), drawn(2, 5, 7), torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]])
    boundary = torch.tensor([[0, 0, 4, 9], [0, 0, 2, 6]])
    logits, joint, tdt = drawn(2, 9, 3, 7), drawn(2, 9, 5, 7), drawn(2, 9, 5, 10)
    ends = torch.tensor([9, 6]), torch.tensor([4, 2])

    def run():
        leaves = [t.clone().requires_grad_() for t in (am, lm, logits, joint, tdt)]
        a, b, c, d, e = leaves
        simple, grads = rnnt.rnnt_loss_simple(b, a, symbols, 0, boundary, reduction="none", return_grad=True)
        smoothed = rnnt.rnnt_loss_smoothed(b, a, symbols, 0, 0.25, 0.1, boundary, reduction="none")
        ranges = rnnt.get_rnnt_prune_ranges(*grads, boundary, 3)
        pruned = rnnt.rnnt_loss_pruned(c, symbols, ranges, 0, boundary, reduction="none")
        whole = rnnt.rnnt_loss(d, symbols, 0, boundary, reduction="none")
        durations = rnnt.tdt_loss(e[..., :7], e[..., 7:], symbols, *ends, 0, (0, 1, 2), reduction="none")
        losses = simple, smoothed, pruned, whole, durations
        found = torch.autograd.grad(sum(loss.sum() for loss in losses), leaves)
        aligned = rnnt.rnnt_align(d.detach(), symbols, 0, boundary)
        return losses, grads, ranges, found, tuple(vars(aligned).values())

    ambient.same_everywhere(lambda: run)


def test_audio():
    pytest.importorskip("kaldi_native_fbank")
    clip = recordings.generated(0.4, 8000, 1)

    def run():
        made = recordings.generated(0.4, 8000, 1)
        stream = streaming.features.StreamFeatures(8000, 20, 8)
        stream.push(made.samples.tolist())
        stream.end()
        return (
            made.samples,
            recordings.joined([clip, clip], 1.0, 1)[0].samples,
            features.batch([clip]),
            [stream.take() for _ in range(len(stream))],
        )

    ambient.same_everywhere(lambda: run)
