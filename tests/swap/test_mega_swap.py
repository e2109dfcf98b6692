# SPDX-License-Identifier: Apache-2.0
"""ESPnet's MEGA decoder swapped: equal results, streaming, several methods bound and undone, unknown code."""

import copy
import pickle

import pytest
import torch

pytest.importorskip("espnet2.asr_transducer.decoder.mega_decoder")

from espnet2.asr_transducer.beam_search_transducer import BeamSearchTransducer, Hypothesis
from espnet2.asr_transducer.decoder.blocks.mega import MEGA
from espnet2.asr_transducer.decoder.mega_decoder import MEGADecoder
from espnet2.asr_transducer.decoder.modules.mega.multi_head_damped_ema import MultiHeadDampedEMA
from steps import close, moved, numbers, seeded, swapped

import fastasr
from fastasr.models.mega import decoder as decoder_file
from fastasr.swap import binding

METHODS = ("forward", "inference", "score", "batch_score", "stack_qk_states")
DROPOUT = {"": 0.1, "embed_": 0.2, "att_": 0.3, "ema_": 0.2, "ffn_": 0.4}
SWAPPED = ("MEGADecoder", "MEGA", "MultiHeadDampedEMA", "NormalizedPositionwiseFeedForward")


def decoder(**arguments):
    seeded(0)
    sizes = {"block_size": 16, "linear_size": 24, "qk_size": 8, "v_size": 20, "num_heads": 2}
    return moved(MEGADecoder(12, **{**sizes, "num_blocks": 2, "max_positions": 24, **arguments}), 0.3).eval()


@pytest.fixture
def model():
    return decoder()


def labels():
    generator = numbers(1)
    batch = torch.randint(1, 12, (3, 9), generator=generator)
    batch[:, 0] = batch[1, 6:] = 0
    return batch


def streamed(model):
    """Returns scores of one hypothesis, then batch scores of its prefixes, and the states at the end."""
    sequence, outs = [0, 4, 7, 1], []
    with torch.no_grad():
        states = model.init_state()
        hyps = [Hypothesis(score=0.0, yseq=[0], dec_state=states)]
        for t in range(1, len(sequence) + 1):
            out, states = model.score(sequence[:t], states)
            outs.append(out)
            hyps.append(
                Hypothesis(score=0.0, yseq=[*sequence[:t], 2], dec_state=model.select_state(states, 0))
            )
        out, after = model.batch_score(hyps)
    return [*outs, out, *(state[key] for state in after for key in sorted(state))]


def everything(model):
    """Calls every method that ``verify`` has to reach."""
    model(labels())
    streamed(model)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"rel_pos_bias_type": "rotary"},
        {"chunk_size": 4},
        {"truncation_length": 3},
        {"activation_type": "mish", "normalization_type": "rms_norm"},
        {
            "activation_type": "swish",
            "activation_args": {"swish_beta": 1.5},
            "normalization_type": "scale_norm",
        },
        {f"{part}dropout_rate": rate for part, rate in DROPOUT.items()},
    ],
    ids=["simple", "rotary", "chunks", "truncated", "mish-rms", "e-swish-scale", "dropout"],
)
def test_swap_and_verify(arguments):
    model = decoder(**arguments)
    expected, steps = model(labels()), streamed(decoder(**arguments))
    report = fastasr.accelerate(model, verify=everything)
    assert report.ok, str(report)
    replaced = {row.class_name for row in report.replaced}
    assert replaced.issuperset(SWAPPED)
    assert all(row.errors for row in report.replaced if row.class_name in SWAPPED)
    close(model(labels()), expected)
    close(streamed(model), steps)


def test_the_report_names_kernels_and_what_differs(model):
    report = fastasr.explain(model)
    block = report["mega_blocks.0.0"]
    assert block.kernels == ("linear", "toeplitz_attention", "gated_residual_norm")
    assert block.reason == "same source as espnet 202511"
    assert "coefficients are computed at every call" in report["mega_blocks.0.0.multihead_damped_ema"].reason
    assert "128 hypotheses of one utterance" in report[""].reason


def test_labels_as_inputs_of_verify(model):
    """Integers have no gradients; a plain call reaches the decoder alone."""
    report = fastasr.accelerate(model, verify=(labels(),))
    assert report.ok
    assert report[""].errors["gradients"] > 0


def test_a_beam_search(model):
    """ESPnet's own search, which clears and reads the decoder's caches, finds the same hypotheses."""

    class Joint(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lin_out = torch.nn.Linear(16, 12)

        def forward(self, encoded, decoded):
            return self.lin_out(torch.tanh(encoded + decoded))

    seeded(7)
    joint, encoded = Joint(), torch.randn(6, 16)
    twin = copy.deepcopy(model)
    fastasr.accelerate(model)
    for kind, options in (("default", {}), ("tsd", {"max_sym_exp": 2}), ("alsd", {"u_max": 4}), ("maes", {})):
        found = []
        with torch.no_grad():
            for each in (model, twin):
                search = BeamSearchTransducer(each, joint, beam_size=3, nbest=3, search_type=kind, **options)
                found.append([(h.yseq, round(float(h.score), 3)) for h in search(encoded)])
        assert found[0] == found[1], kind


# --------------------------------------------------------------------------- several methods
def test_methods_are_bound_and_undone(model):
    before = {name: set(vars(m)) for name, m in model.named_modules()}
    report = fastasr.accelerate(model)
    for name in METHODS:
        assert binding.bound_function(model, name) is not None
        assert vars(model)[name].__self__ is model
    with fastasr.eager_mode(model):
        assert not set(METHODS) & set(vars(model))
        assert {name: set(vars(m)) for name, m in model.named_modules()} == before
    assert all(binding.bound_function(model, name) is not None for name in METHODS)
    assert fastasr.restore(model) == len(report.replaced)
    assert {name: set(vars(m)) for name, m in model.named_modules()} == before
    assert "score" not in vars(decoder())


def test_methods_in_copies_and_pickles(model):
    expected = streamed(model)
    fastasr.accelerate(model)
    twin = copy.deepcopy(model)
    assert all(vars(twin)[name].__self__ is twin for name in METHODS)
    loaded = pickle.loads(pickle.dumps(model))
    assert all(binding.bound_function(loaded, name) is None for name in METHODS)
    for each in (twin, loaded):
        close(streamed(each), expected)
    assert "" in [row.path for row in fastasr.accelerate(loaded).replaced]
    assert all(vars(loaded)[name].__self__ is loaded for name in METHODS)


def test_a_forward_replaced_afterwards_takes_the_methods_along(model):
    fastasr.accelerate(model, only="")
    model.forward = lambda batch: batch
    assert fastasr.restore(model) == 0
    assert not {"inference", "score", "batch_score", "stack_qk_states"} & set(vars(model))


def test_a_method_replaced_on_the_instance_is_declined(model):
    model.score = lambda sequence, states: None
    report = fastasr.accelerate(model)
    assert report[""].status == "skipped"
    assert report[""].reason.startswith("its score was already replaced on this instance, by ")
    assert report["mega_blocks.0.0"].status == "replaced"
    assert model.score([0], None) is None


def test_only_some_modules(model):
    """The decoder calls upstream's blocks with the masks they need, and upstream's decoder calls fastasr's blocks."""
    expected = model(labels())
    for only in ("", "mega_blocks.*.0", "*.multihead_damped_ema", "*.rel_pos_bias", "mega_blocks.0.*"):
        twin = swapped(model, only=only)
        close(twin(labels()), expected)
        close(streamed(twin), streamed(decoder()))


# --------------------------------------------------------------------------- caches
def test_the_swapped_score_cache(model, monkeypatch):
    monkeypatch.setattr(decoder_file, "SCORE_CACHE_SIZE", 4)
    with torch.no_grad():
        model.score([0], model.init_state())
        fastasr.accelerate(model)
        assert model.score_cache == {}
        _, states = model.score([0], model.init_state())
        for label in range(1, 9):
            model.score([0, label], states)
        assert len(model.score_cache) == 4
        model.score_cache = {}  # as ESPnet's search does
        model.score([0], model.init_state())
        assert len(model.score_cache) == 1


def test_coefficients_follow_the_parameters(model):
    """ESPnet keeps the coefficients of the first step, whatever is loaded later."""
    other = decoder(num_blocks=2)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(0.7)
        streamed(model)
        fastasr.accelerate(model)
        model.load_state_dict(other.state_dict())
        close(streamed(model), streamed(other))
    fastasr.restore(model)
    assert model.mega_blocks[0][0].multihead_damped_ema._coeffs is None


# --------------------------------------------------------------------------- what is declined
def reason(model, path):
    row = fastasr.explain(model)[path]
    assert row.status == "skipped"
    return row.reason


def test_unknown_source_is_declined():
    class Laplace(MEGA):
        def softmax_attention(self, query, key, mask=None, attn_mask=None):
            return torch.matmul(query, key.transpose(2, 3)).sigmoid()

    class Slow(MultiHeadDampedEMA):
        def forward(self, x, mask=None, state=None):
            return super().forward(x, mask=mask, state=state)

    model = decoder()
    model.mega_blocks[0][0].__class__ = Laplace
    model.mega_blocks[1][0].multihead_damped_ema.__class__ = Slow
    assert "subclass of MEGA that overrides softmax_attention" in reason(model, "mega_blocks.0.0")
    assert "subclass of MultiHeadDampedEMA" in reason(model, "mega_blocks.1.0.multihead_damped_ema")
    report = fastasr.accelerate(model, verify=everything)
    assert report.ok
    assert report["mega_blocks.1.0"].status == report[""].status == "replaced"


def test_restore_lets_go_of_packed_weights(model):
    from fastasr.models.mega import decoding

    fastasr.accelerate(model)
    streamed(model)
    if not decoding._native():
        pytest.skip("no native library")
    assert model in decoding._PLANS._of
    fastasr.restore(model)
    assert model not in decoding._PLANS._of


def test_verify_runs_the_packed_step(model, monkeypatch):
    """Verification compares the code that serves a step after the swap."""
    from fastasr.models.mega import decoding

    if not decoding._native():
        pytest.skip("no native library")
    served, step = [], decoding.step

    def counted(*arguments):
        result = step(*arguments)
        served.append(result is not None)
        return result

    monkeypatch.setattr(decoding, "step", counted)
    assert fastasr.accelerate(model, verify=everything).ok
    assert any(served)
