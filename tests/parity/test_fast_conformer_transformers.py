# SPDX-License-Identifier: Apache-2.0
"""FastConformer against transformers' Parakeet: values, gradients, random draws, masks, state dicts."""

import pytest
import torch
from steps import close, cotangent, moved, same_state, same_step, seeded
from tiny_parakeet import SIZES, STILL

pytest.importorskip("transformers")

from transformers import ParakeetCTCConfig, ParakeetEncoder, ParakeetEncoderConfig, ParakeetForCTC

import fastasr
from fastasr import ops
from fastasr.models import fast_conformer as ours
from fastasr.models.fast_conformer import masks, subsampling

FRAMES = 75
LENGTHS = {
    "no mask": None,
    "all valid": (FRAMES, FRAMES, FRAMES),
    "padded": (FRAMES, 50, 9),
    "an empty sequence": (FRAMES, 0, 1),
}


DTYPES = {"sdpa": torch.float64, "eager": torch.float32}  # the softmax of eager is in float32
TOLERANCES = {"sdpa": 1e-10, "eager": 2e-5}


def pair(dtype=torch.float64, **options):
    """Returns transformers' encoder with parameters and statistics away from their first values, and ours with the
    same."""
    seeded(0)
    theirs = moved(ParakeetEncoder(ParakeetEncoderConfig(**SIZES, **options)), 0.1)
    for name, buffer in theirs.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
        elif name.endswith("running_mean"):
            buffer.normal_()
    model = ours.FastConformerEncoder.from_config(theirs.config)
    model.load_state_dict(theirs.state_dict())
    return theirs.to(dtype), model.to(dtype)


def inputs(lengths, dtype=torch.float64):
    seeded(1)
    x = torch.randn(3, FRAMES, SIZES["num_mel_bins"], dtype=dtype)
    if lengths is None:
        return x, None
    return x, (torch.arange(FRAMES) < torch.tensor(lengths)[:, None]).long()


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_values_and_gradients(implementation, lengths, training):
    dtype, tolerance = DTYPES[implementation], TOLERANCES[implementation]
    theirs, model = pair(dtype, **STILL)
    theirs.set_attn_implementation(implementation)
    theirs.train(training), model.train(training)
    call = inputs(lengths, dtype)
    same_step(model, theirs, *call, tolerance=tolerance, share=1.0)
    for (name, b), (_, b0) in zip(model.named_buffers(), theirs.named_buffers(), strict=True):
        assert torch.allclose(b, b0, rtol=1e-5 if b.is_floating_point() else 0), name
    mask, expected = model(*call)[1], theirs(*call).attention_mask
    assert mask is expected is None or torch.equal(mask.int(), expected)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_same_draws(implementation):
    dtype, tolerance = DTYPES[implementation], TOLERANCES[implementation]
    theirs, model = pair(dtype, dropout_positions=0.2, **{**STILL, "dropout": 0.1, "attention_dropout": 0.2})
    theirs.set_attn_implementation(implementation)
    theirs.train(), model.train()
    x, mask = inputs(LENGTHS["padded"], dtype)
    with fastasr.upstream_draws():
        same_step(model, theirs, x, mask, tolerance=tolerance, seed=3, share=1.0)


@pytest.mark.parametrize("masked", [False, True])
def test_the_kernel_draws_dropout_itself(masked, monkeypatch):
    """It agrees with the definition for the same seed, and its mean over many draws with upstream's result in eval."""
    theirs, model = (m.layers[0].self_attn for m in pair(**{**STILL, "attention_dropout": 0.25}))
    frames = 9
    seeded(1)
    x = torch.randn(2, frames, theirs.q_proj.in_features, dtype=torch.float64)
    positions = torch.randn(1, 2 * frames - 1, x.shape[2], dtype=torch.float64).expand(2, -1, -1)
    mask = None
    if masked:
        seen = torch.arange(frames) < torch.tensor([[frames], [5]])
        mask = (seen[:, None, :] & seen[:, :, None])[:, None]

    def draw(module, seed=3):
        seeded(seed)
        return module(x, positions, mask)[0]

    expected = draw(model)
    assert torch.equal(draw(model), expected)
    assert not torch.equal(draw(model, 4), expected)
    with monkeypatch.context() as patched:
        patched.setattr(ops, "rel_attention", ops.rel_attention.definition)
        close(draw(model), expected, 1e-12)
    with torch.no_grad():
        count = 2000
        found = torch.stack([draw(model, seed) for seed in range(count)])
        truth = draw(theirs.eval())
    deviation = found.std(0) * count**-0.5
    assert ((found.mean(0) - truth).abs() <= 6 * deviation + 1e-12).all()


@pytest.mark.parametrize("lengths", [(9, 9), (9, 4), (9, 0)], ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_a_mask_of_frames_is_that_of_their_pairs(lengths, training):
    _, model = pair(**STILL)
    block = model.layers[0].train(training)
    seeded(1)
    x = torch.randn(2, 9, block.norm_out.weight.numel(), dtype=torch.float64)
    positions = model.encode_positions(x)
    valid = torch.arange(9) < torch.tensor(lengths)[:, None]
    outputs = []
    for mask in (valid, masks.pairs(valid)):
        y = block(x.requires_grad_(), mask, positions)
        outputs.append((y.detach(), *torch.autograd.grad(y, [x, *block.parameters()], cotangent(y))))
    for a, b in zip(*outputs, strict=True):
        assert torch.equal(a, b)


def test_layer_drop_draws_as_upstream():
    theirs, model = pair(**{**STILL, "layerdrop": 0.5})
    theirs.train(), model.train()
    x, mask = inputs(LENGTHS["padded"])
    for seed in range(4):
        same_step(model, theirs, x, mask, tolerance=1e-10, seed=seed, share=1.0)


@pytest.mark.parametrize("bias", [True, False])
def test_state_dicts_load_both_ways(bias):
    theirs, model = pair(attention_bias=bias, convolution_bias=bias)
    same_state(model, theirs)


def test_ctc():
    seeded(0)
    config = ParakeetCTCConfig(vocab_size=11, pad_token_id=10, encoder_config=ParakeetEncoderConfig(**SIZES))
    theirs = ParakeetForCTC(config).eval()
    model = ours.FastConformerCTC(ours.FastConformerEncoder.from_config(config.encoder_config), 11).eval()
    model.load_state_dict(theirs.state_dict())
    x, mask = inputs(LENGTHS["padded"])
    with torch.no_grad():
        found, out_mask = model(x.float(), mask)
        close(found, theirs(x.float(), attention_mask=mask).logits.log_softmax(-1))
        tokens = theirs.generate(x.float(), attention_mask=mask)
    tokens = getattr(tokens, "sequences", tokens)
    assert torch.equal(found.argmax(-1)[out_mask], tokens[out_mask])


@pytest.mark.parametrize("frames", [1, 2, 8, 9, 75, 200])
@pytest.mark.parametrize("strip_bytes", [1, 20_000, 1 << 30], ids=["strips of one", "strips", "whole"])
def test_the_front_end_in_strips(frames, strip_bytes, monkeypatch):
    monkeypatch.setattr(subsampling, "STRIP_BYTES", strip_bytes)
    theirs, model = pair()
    seeded(1)
    x = torch.randn(3, frames, SIZES["num_mel_bins"], dtype=torch.float64)
    mask = torch.arange(frames) < torch.tensor([frames, frames // 2, 0])[:, None]
    with torch.no_grad():
        for each in (mask, None):
            close(model.subsampling(x, each), theirs.subsampling(x, each), 1e-12)
    for each in (mask, None):
        results = []
        for side in (theirs.subsampling, model.subsampling):
            leaf = x.clone().requires_grad_()
            y = side(leaf, each)
            results.append((y, *torch.autograd.grad(y.sin().sum(), [leaf, *side.parameters()])))
        for expected, found in zip(*results, strict=True):
            close(found, expected, 1e-10)


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("trained", ["layers.2", "layers.3", "linear"])
@pytest.mark.parametrize("strip_bytes", [20_000, 1 << 30], ids=["strips", "whole"])
def test_the_front_end_with_frozen_parts(trained, backend, strip_bytes, monkeypatch):
    monkeypatch.setattr(subsampling, "STRIP_BYTES", strip_bytes)
    theirs, model = pair()
    x, mask = inputs(LENGTHS["padded"])
    grads = []
    for each in (theirs.subsampling, model.subsampling):
        each.requires_grad_(False).get_submodule(trained).requires_grad_(True)
        with fastasr.backend(backend):
            y = each(x, mask)
        seeded(2)
        grads.append(torch.autograd.grad(y, each.get_submodule(trained).weight, torch.randn_like(y))[0])
    close(grads[1], grads[0], 1e-10)


def test_one_frame_and_none():
    theirs, model = pair()
    theirs.eval(), model.eval()
    with torch.no_grad():
        x = torch.randn(2, 1, SIZES["num_mel_bins"], dtype=torch.float64)
        close(model(x)[0], theirs(x).last_hidden_state, 1e-10)
        assert model(x[:, :0])[0].shape == (2, 0, SIZES["hidden_size"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_positions_of_a_model_of_16_bits(dtype):
    """``to`` has rounded the frequencies, which upstream then reads in float32."""
    positions = ParakeetEncoder(ParakeetEncoderConfig(**SIZES)).to(dtype).encode_positions
    assert positions.inv_freq.dtype is dtype
    x = torch.randn(2, FRAMES, SIZES["hidden_size"]).to(dtype)
    expected = positions(x)
    assert fastasr.accelerate(positions).replaced
    close(positions(x), expected, torch.finfo(dtype).eps)
    assert positions(x).stride(0) == 0  # One table for all sequences: then the attention runs in the kernel.
