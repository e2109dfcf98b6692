# SPDX-License-Identifier: Apache-2.0
"""Every way back from fastasr's fast path: what leaves it computes what upstream does, says so once, and
``fastasr.why`` names the reason. ``tests/parity/test_conformer_ways_back.py`` has those of the Conformers."""

import contextlib
import functools
import logging

import families
import nemo_encoder
import pytest
import tiny_emformer_rnnt
import torch
from leaving import Case, beside, check, unreached
from packed_layers import chunk_of
from steps import moved, numbers, seeded, swapped
from test_parakeet_generate import batch, parakeet
from tiny_parakeet import SIZES, STILL
from tiny_recogniser import RECOGNISER, STREAMING

pytest.importorskip("transformers")
pytest.importorskip("torchaudio.models.rnnt")
pytest.importorskip("espnet2.asr_transducer.decoder.mega_decoder")

import transformers
from test_mega_swap import decoder
from test_nemotron_swap import CACHE
from test_nemotron_swap import encoder as nemotron_encoder
from test_zipformer_chunks_swap import LENGTHS, PADDING, source, upstream
from torch.autograd import forward_ad
from torchaudio.models import emformer, rnnt

import fastasr
from fastasr.asr import decoding
from fastasr.asr.recogniser import AsrModel
from fastasr.asr.streaming import StreamingEncoder
from fastasr.compat import transformers as compat
from fastasr.models.fast_conformer import FastConformerEncoder
from fastasr.models.zipformer.layer import ZipformerEncoderLayer, constant_attention_in_eval
from fastasr.ops import _dispatch
from fastasr.swap import binding
from fastasr.testing.tape import TapeRecorder

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using the model-agnostic default"),
    pytest.mark.skipif(bool(_dispatch.why_not_native()), reason=_dispatch.why_not_native()),
]
CASES = {}


def cases(*names, **reasons):
    """Registers a function that makes the case of each name. ``reasons``: name -> what the function takes beside it."""

    def register(function):
        given = {name: (name,) for name in names} | {name: (name, reason) for name, reason in reasons.items()}
        for name, arguments in (given or {"": ()}).items():
            CASES[f"{function.__name__} {name}".strip()] = functools.partial(function, *arguments)
        return function

    return register


def bfloat16():
    return torch.autocast("cpu", torch.bfloat16)


def eager():
    return fastasr.backend("eager")


@contextlib.contextmanager
def distributed():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


# --------------------------------------------------------------------------- Parakeet's generate
class _Stop(transformers.StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] > 4)


class _Streamer:
    def put(self, tokens):
        pass

    def end(self):
        pass


CALLS = {
    "eos_token_id": ({"eos_token_id": 3}, "it stops by EosTokenCriteria"),
    "stopping_criteria": (
        {"stopping_criteria": transformers.StoppingCriteriaList([_Stop()])},
        "it stops by _Stop",
    ),
    "suppress_tokens": (
        {"suppress_tokens": [1, *range(12, 17)]},
        "suppress_tokens has more than the durations",
    ),
    "repetition_penalty": ({"repetition_penalty": 1.3}, "it changes logits by RepetitionPenalty"),
    "streamer": ({"streamer": _Streamer()}, "the call asks for streamer"),
}


def of_generate(model, reason, options=None, inputs=None, **more):
    seeded("inputs")
    inputs = (batch() if inputs is None else inputs) | (options or {})
    fastasr.accelerate(model, only=[type(model)])
    return Case(
        model,
        lambda: model.generate(**inputs),
        lambda: type(model).generate(model, **inputs),
        "generate",
        reason,
        **more,
    )


@cases(**CALLS)
def generate_asked_for(name, asked):
    seeded(0)
    options, reason = asked
    return of_generate(parakeet(), reason, options, batch(1) if name == "streamer" else None)


@cases()
def generate_in_a_process_group():
    seeded(0)
    return of_generate(parakeet(), "torch.distributed is initialised", around=distributed)


@cases()
def generate_of_a_duration_that_wins():
    """Upstream takes the duration for a token."""
    seeded(0)
    model = parakeet()
    model.generation_config.suppress_tokens = None
    with torch.no_grad():
        model.joint.head.bias[12:] += 50
    return of_generate(model, "a duration has the largest logit", {"max_new_tokens": 1})


@cases(
    hooks="the model has hooks",
    float64="the encoder's output is float64 on cpu",
    training="it is in training mode",
    joint="a submodule has hooks or another forward",
    gelu="activation is GELU",
    symbols="max_symbols_per_step is 0",
    eager="the backend eager is in force",
)
def generate_of_a_model_with(what, reason):
    seeded(0)
    durations = None if what == "symbols" else (0, 1, 2)
    model = parakeet(durations=durations, hidden_act="gelu" if what == "gelu" else "relu")
    inputs = batch()
    more = {}
    if what == "float64":
        model.double()
        inputs["input_features"] = inputs["input_features"].double()
    if what == "training":
        model.decoder.train()
    if what == "joint":
        model.joint.register_forward_hook(lambda module, args, result: result + 1)
    if what == "symbols":
        model.max_symbols_per_step = 0
        inputs["max_new_tokens"] = 5
    if what == "eager":
        more["around"] = eager
    case = of_generate(model, reason, inputs=inputs, known="float32" if what == "float64" else True, **more)
    if what == "hooks":
        model.register_forward_hook(lambda module, args, result: None)
    return case


# --------------------------------------------------------------------------- Parakeet's loss
@cases(
    return_dict="return_dict is False",
    gelu="hidden_act is gelu, expected relu or tanh",
    head="joint.head is not a plain Linear",
    hooks="joint has hooks",
    function="loss_function is fastasr.compat.transformers.ParakeetForTDTLoss",
    object="loss_function is functools.partial",
)
def loss(what, reason):
    seeded(0)
    model = parakeet(hidden_act="gelu" if what == "gelu" else "relu")
    labels = torch.tensor([[1, 2], [3, 1], [2, 2]])
    ids = torch.cat((torch.full((3, 1), 11), labels), 1)
    inputs = batch() | {"decoder_input_ids": ids, "labels": labels}
    if what == "return_dict":
        inputs["return_dict"] = False
    if what == "head":
        model.joint.head.__class__ = type("_Head", (torch.nn.Linear,), {})
    if what == "hooks":
        model.joint.register_forward_hook(lambda *_: None)
    if what == "function":
        model.loss_function = compat.ParakeetForTDTLoss
    if what == "object":
        model.loss_function = functools.partial(compat.ParakeetForTDTLoss)
    fastasr.accelerate(model, only=[type(model)])
    return Case(
        model,
        lambda: model(**inputs),
        lambda: type(model).forward(model, **inputs),
        "forward",
        reason,
        known=what != "return_dict",
    )


# --------------------------------------------------------------------------- native calls of layers
@contextlib.contextmanager
def no_library():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_dispatch, "why_not_native", lambda: "there is no library")
        yield


@contextlib.contextmanager
def transformed():
    with torch.no_grad(), forward_ad.dual_level():
        yield


DECLINED = {
    "autocast": ("autocast is on", bfloat16, logging.WARNING),
    "eager": ("backend 'eager' is forced", eager, logging.INFO),
    "gradients": ("gradients are on", torch.enable_grad, logging.INFO),
    "switch": ("packed_streaming is False", torch.no_grad, logging.INFO),
    "hooks": ("has hooks", torch.no_grad, logging.WARNING),
    "training": ("is in training mode", torch.no_grad, logging.WARNING),
    "arguments": ("that the native call does not read", torch.no_grad, logging.WARNING),
    "library": ("there is no library", no_library, logging.WARNING),
    "transform": ("the call is under forward-mode differentiation", transformed, logging.INFO),
}


def declined(name, theirs, run, arguments, unread, layer, watched, method):
    """Returns the case of a layer at the path ``layer`` whose native call is declined. ``run(model, *arguments)``;
    ``unread`` are arguments that the native call does not read; the submodule ``watched`` gets a hook."""
    reason, around, level = DECLINED[name]
    ours = swapped(theirs)
    arguments = unread if name == "arguments" else arguments
    if name == "hooks":
        ours.get_submodule(watched).register_forward_hook(lambda *_: None)
    if name == "training":
        ours.get_submodule(watched).train()
    if name in ("hooks", "training"):
        reason = f"{watched.removeprefix(layer).lstrip('.')} {reason}"
    if name == "switch":
        ours.get_submodule(layer).packed_streaming = False
    return beside(
        ours,
        theirs,
        lambda model: run(model, *arguments),
        f"{layer}.{method}".lstrip("."),
        reason,
        gradients=name == "gradients",
        level=level,
        around=around,
        tolerance=0.1 if name == "autocast" else 1e-4,
    )


def causal_layer():
    return upstream().encoders[0].layers[0]


def whole(layer):
    """Returns the arguments of ``forward``."""
    seeded("whole")
    return torch.randn(5, 2, layer.embed_dim), torch.randn(
        1, 9, layer.self_attn_weights.linear_pos.in_features
    )


@cases("autocast", "eager", "gradients", "hooks", "training", "library", "transform")
def zipformer_layer(name):
    layer = causal_layer()
    return declined(name, layer, lambda m, *a: m(*a), whole(layer), None, "", "norm", "forward")


@cases(*DECLINED)
def chunk_of_a_zipformer_layer(name):
    layer = causal_layer()
    seeded("chunk")
    x, positions, *others = arguments = chunk_of(layer, masked=torch.zeros(2, 10, dtype=torch.bool))
    unread = x, positions.expand(2, -1, -1), *others
    return declined(
        name, layer, lambda m, *a: m.streaming_forward(*a), arguments, unread, "", "norm", "streaming_forward"
    )


@cases(*DECLINED)
def segment_of_emformer_layers(name):
    seeded("segment")
    theirs = emformer.Emformer(
        12, 3, 20, 2, 4, left_context_length=5, right_context_length=2, max_memory_size=2
    )
    x, other, lengths = torch.randn(3, 6, 12), torch.randn(3, 12, 6).transpose(1, 2), torch.tensor([6, 6, 6])
    layer = "emformer_layers.0"
    return declined(
        name,
        theirs.eval(),
        lambda m, x: m.infer(x, lengths),
        (x,),
        (other,),
        layer,
        f"{layer}.pos_ff.2",
        "infer",
    )


@cases()
def zipformer_layer_with_upstreams_attention():
    theirs = causal_layer()
    ours = swapped(theirs, exclude="self_attn1")
    return beside(
        ours,
        theirs,
        lambda layer: layer(*whole(layer)),
        "forward",
        "self_attn1 runs other code than fastasr's",
    )


@cases()
def zipformer_layer_of_old_icefall():
    theirs = causal_layer()
    ours = swapped(theirs)
    ours.const_attention_rate.default = 0.0
    binding.unbind(ours)
    binding.bind(
        ours, constant_attention_in_eval, (("streaming_forward", ZipformerEncoderLayer.streaming_forward),)
    )
    reason = "this version of icefall may draw constant attention weights"
    return beside(
        ours, theirs, lambda layer: layer(*whole(layer)), "forward", reason, known=True, level=logging.INFO
    )


# --------------------------------------------------------------------------- encoders
@cases(unswapped="encoders.0.layers.0 is not swapped", hooks="encoders.0 has a hook")
def causal_encoder(what, reason):
    theirs = upstream()
    ours = swapped(theirs, exclude="encoders.0.layers.0" if what == "unswapped" else None)
    if what == "hooks":
        ours.encoders[0].register_forward_hook(lambda *_: None)
    return beside(
        ours, theirs, lambda model: model(source(), LENGTHS, PADDING), "forward", reason, known=True
    )


@cases(hooks="encoders.0.layers.0.norm has a hook", mask="its mask is not one of lengths")
def encoder_without_padding(what, reason):
    theirs = upstream()
    ours = swapped(theirs, ragged=True)
    mask = PADDING.clone()
    if what == "hooks":
        ours.encoders[0].layers[0].norm.register_forward_hook(lambda *_: None)
    else:
        mask[0, 3] = True
    return beside(
        ours, theirs, lambda model: model(source(), LENGTHS, mask), "forward", reason, known=what == "hooks"
    )


# --------------------------------------------------------------------------- FastConformers
@cases(
    subsampling="one of its layers has hooks or is no plain one",
    weights="the attention has hooks, which may read its weights",
    draws="upstream_draws is on",
    dropped="the dropout of attention weights has hooks, is no plain Dropout, or drops all",
    positions="each sequence has position embeddings of its own",
    mask="an input, a mask or positions that rel_attention does not take",
)
def parakeet_encoder(what, reason):
    """Of the layers' attention the first one alone is called."""
    seeded(0)
    eager_attention = {"attn_implementation": "eager"} if what == "weights" else {}
    config = transformers.ParakeetEncoderConfig(**SIZES | STILL, **eager_attention)
    theirs = moved(transformers.ParakeetEncoder(config), 0.05).eval()
    ours, key = swapped(theirs), "layers.0.self_attn.forward"
    x, positions = torch.randn(2, 5, 24), torch.randn(1, 9, 24).expand(2, -1, -1)
    if what == "positions":
        positions = positions + torch.tensor([0.0, 0.1])[:, None, None]
    if what == "subsampling":
        ours.subsampling.layers[0].register_forward_hook(lambda *_: None)
        features, key = torch.randn(2, 60, 16), "subsampling.forward"
    if what == "weights":
        ours.layers[0].self_attn.register_forward_hook(lambda *_: None)
    for model in (ours, theirs):
        if what in ("draws", "dropped"):
            model.layers[0].self_attn.train().attention_dropout = 0.5 if what == "draws" else 1.0

    def run(model):
        seeded("dropout")
        if what == "subsampling":
            return model.subsampling(features)
        mask = torch.zeros(1, 1, 5, 5) if what == "mask" else None
        return model.layers[0].self_attn(x, position_embeddings=positions, attention_mask=mask)[0]

    return beside(
        ours,
        theirs,
        run,
        key,
        reason,
        level=logging.INFO if what == "draws" else logging.WARNING,
        around=fastasr.upstream_draws if what == "draws" else contextlib.nullcontext,
    )


@cases(
    triangle="zero_triu is set",
    draws="upstream_draws is on, so attention forms its weights",
    hooks="the dropout of attention weights has hooks",
)
def espnet_attention(what, reason):
    """In inference, with a dropout of the weights that is in training mode."""
    seeded(0)
    theirs, run = families.e_branchformer(zero_triu=what == "triangle", attention_dropout_rate=0.5)
    theirs.eval().encoders[0].attn.dropout.train(what == "draws")
    ours = swapped(theirs)
    if what == "hooks":
        ours.encoders[0].attn.dropout.register_forward_hook(lambda *_: None)

    def seeded_run(model):
        seeded("dropout")
        return run(model)

    return beside(
        ours,
        theirs,
        seeded_run,
        "encoders.0.attn.forward",
        reason,
        level=logging.INFO if what == "draws" else logging.WARNING,
        around=fastasr.upstream_draws,
    )


@cases(
    eager=("layers.0.self_attn", "the attention implementation is eager"),
    convolution=("layers.0.conv", "depthwise_conv has hooks"),
    subsampling=("subsampling", "one of its layers has hooks or is no plain one"),
    chunk=("", "upstream's forward makes a mask of pairs"),
)
def nemotron(what, layer_and_reason):
    theirs = nemotron_encoder()
    ours = swapped(theirs)
    layer, reason = layer_and_reason
    if what == "eager":
        for model in (ours, theirs):
            model.set_attn_implementation("eager")  # upstream gives NaN
    if what == "convolution":
        ours.get_submodule(f"{layer}.depthwise_conv").register_forward_hook(lambda *_: None)
    if what == "subsampling":
        ours.subsampling.conv_in.register_forward_hook(lambda *_: None)
    x = torch.randn(2, 80, SIZES["num_mel_bins"], generator=numbers("nemotron"))

    def run(model):
        if what != "chunk":
            return model(x, num_lookahead_tokens=3).last_hidden_state
        options = {"num_lookahead_tokens": 3, "use_cache": True}
        out = model(x[:, :25], **options)
        options |= {"padding_cache": out.padding_cache, CACHE: out[CACHE]}
        return model(
            x[:, 25:57], attention_mask=torch.ones(2, 32, dtype=torch.int64), **options
        ).last_hidden_state

    return beside(ours, theirs, run, f"{layer}.forward".lstrip("."), reason)


# --------------------------------------------------------------------------- MEGA
@cases("autocast", "eager", "gradients", "switch", "hooks", "relu", "states", "transform")
def mega_decoder(what):
    theirs = decoder(**({"activation_type": "relu"} if what == "relu" else {}))
    ours = swapped(theirs)
    if what == "switch":
        ours.packed_decoding = False
    if what == "hooks":
        ours.mega_blocks[0][1].normalization.register_forward_hook(lambda *_: None)
    labels, states = torch.tensor([[1]]), theirs.init_state()
    if what == "states":
        states = [{name: torch.nn.Parameter(t, False) for name, t in state.items()} for state in states]
    reason, around, level = {
        **DECLINED,
        "switch": ("packed_decoding is False", torch.no_grad, logging.INFO),
        "relu": ("the activation is not swish", torch.no_grad, logging.WARNING),
        "states": ("states that the step does not read", torch.no_grad, logging.WARNING),
    }[what]
    return beside(
        ours,
        theirs,
        lambda model: model.inference(labels, states),
        "inference",
        reason,
        gradients=what == "gradients",
        known=what in ("autocast", "eager", "switch", "transform"),
        level=level,
        around=around,
        tolerance=0.1 if what == "autocast" else 1e-4,
    )


# --------------------------------------------------------------------------- torchaudio's RNN-T
@cases(
    x2g="x2g has hooks",
    c_norm="c_norm has hooks",
    bias="x2g has a bias before a norm",
    eps="g_norm and c_norm differ in eps",
)
def lstm(what, reason):
    seeded(0)
    theirs = rnnt._Predictor(9, 14, 12, 2, 16, True, 1e-3, 0.0).eval()
    ours, layer = swapped(theirs), "lstm_layers.0"
    labels, lengths = torch.randint(0, 9, (3, 7)), torch.tensor([7, 5, 2])
    if what in ("x2g", "c_norm"):
        ours.get_submodule(f"{layer}.{what}").register_forward_hook(lambda *_: None)
    for model in (theirs, ours):
        if what == "bias":
            model.lstm_layers[0].x2g.bias = torch.nn.Parameter(torch.linspace(-1, 1, 64))
        if what == "eps":
            model.lstm_layers[0].c_norm.eps = 1e-2
    return beside(ours, theirs, lambda model: model(labels, lengths), f"{layer}.forward", reason, known=True)


# --------------------------------------------------------------------------- searches and engines
class Onnx:
    """Stands for an ONNX model, whose sessions run a model's modules."""

    context_size, blank_id = 2, 0

    def __init__(self, model):
        self.model = model

    def run_decoder(self, y):
        return self.model.joiner.decoder_proj(self.model.decoder(y, need_pad=False)[:, 0])

    def run_joiner(self, frames, predictions):
        return self.model.joiner(frames, predictions, project_input=False)


def asr_model():
    seeded(0)
    model = AsrModel(**RECOGNISER | STREAMING | {"vocab_size": 12}).eval()
    with torch.no_grad():
        for projection in (model.joiner.output_linear, model.joiner.encoder_proj, model.joiner.decoder_proj):
            projection.weight.normal_(std=0.8)
    return model


@cases(
    hooks="a submodule has hooks or another forward",
    eager="the backend eager is in force",
    onnx="the model is not made of modules of a known transducer",
    rnnt="the backend eager is in force",
)
def greedy_search(what, reason):
    seeded("greedy")
    if what == "rnnt":
        model = tiny_emformer_rnnt.tiny(rnnt).eval()
        frames = torch.randn(2, 9, 14)
    else:
        model = asr_model()
        frames = torch.randn(2, 9, 24)
    expected = decoding.greedy_search(model, frames)
    assert any(expected.tokens)
    if what == "hooks":
        model.decoder.register_forward_hook(lambda *_: None)
    if what == "onnx":
        frames = model.joiner.encoder_proj(frames).detach()
        model = Onnx(model)
    search = decoding.GreedySearch(model)

    def numbers_of(result):
        rows = zip(result.tokens, result.timestamps, result.scores, strict=True)
        return [torch.tensor([*tokens, *stamps, score]) for tokens, stamps, score in rows]

    return Case(
        search,
        lambda: numbers_of(search.result(search.advance(search.start(2), frames))),
        lambda: numbers_of(expected),
        "advance",
        reason,
        known=True,
        level=logging.WARNING if what == "hooks" else logging.INFO,
        around=eager if what in ("eager", "rnnt") else contextlib.nullcontext,
    )


@cases()
def streaming_engine():
    model, features = asr_model(), torch.randn(1, 29, 80, generator=numbers("engine"))
    native = StreamingEncoder.from_model(model, 8, 16)
    with no_library():
        engine = StreamingEncoder.from_model(model, 8, 16)
    stream, other = engine.open(), native.open()

    def step(engine, stream):
        engine.reset(stream)
        return engine.step(features, [stream])

    return Case(
        engine,
        lambda: step(engine, stream),
        lambda: step(native, other),
        "step",
        "there is no library",
        known=True,
    )


# --------------------------------------------------------------------------- hooks of all modules
@contextlib.contextmanager
def _hook_of_all_modules():
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        yield
    finally:
        handle.remove()


@cases()
def hook_of_all_modules():
    theirs = emformer.Emformer(12, 3, 20, 1, 4).eval()
    ours = swapped(theirs, only=lambda path, _: path == "")
    call = torch.randn(2, 8, 12, generator=numbers(1)), torch.tensor([8, 8])
    reason = "hooks of all modules are registered"
    return beside(ours, theirs, lambda model: model(*call)[0], "forward", reason, around=_hook_of_all_modules)


# --------------------------------------------------------------------------- Emformer's attention
@cases("forward", "infer")
def emformer_attention(method):
    theirs = emformer.Emformer(12, 3, 20, 1, 4).eval()
    ours = swapped(theirs)
    ours.emformer_layers[0].attention.register_forward_hook(lambda *_: None)
    call = torch.randn(2, 4, 12, generator=numbers(1)), torch.tensor([4, 4])

    def run(model):
        return getattr(model, method)(*call)[0]

    reason = "its attention has hooks or another forward"
    return beside(ours, theirs, run, f"emformer_layers.0.{method}", reason)


# --------------------------------------------------------------------------- Zipformer's loss
@cases()
def joiner():
    theirs, run = families.make("zipformer recogniser")
    ours = swapped(theirs, only=lambda path, _: path == "")
    ours.joiner.output_linear.register_forward_hook(lambda *_: None)
    reason = "the joiner has hooks or is no plain one: its logits are formed"
    return beside(ours, theirs, run, "forward_transducer", reason)


# --------------------------------------------------------------------------- NeMo's loss and joint
@cases()
def nemo_loss():
    _, losses = nemo_encoder.load_transducer()
    theirs = losses.RNNTLoss(6, "mean_batch", "pytorch", {})
    theirs._force_float32 = False
    ours = swapped(theirs)
    ours._loss.register_forward_hook(lambda *_: None)
    call = {
        "log_probs": torch.randn(2, 5, 4, 7, generator=numbers(1)).log_softmax(-1),
        "targets": torch.randint(0, 6, (2, 3), generator=numbers(2)),
        "input_lengths": torch.tensor([5, 4]),
        "target_lengths": torch.tensor([3, 2]),
    }
    reason = "its loss has hooks or another forward"
    return beside(ours, theirs, lambda model: model(**call), "forward", reason)


@cases(
    hooks="that is not a plain Linear",
    clamp="the loss clamps the gradients",
    temperature="temperature is 1.5, expected 1",
    draws="upstream_draws is on",
)
def nemo_joint(what, reason):
    joints, losses = nemo_encoder.load_transducer()
    seeded("joint")
    sizes = {"encoder_hidden": 5, "pred_hidden": 4, "joint_hidden": 8}
    options = {"activation": "relu", "dropout": 0.5 if what == "draws" else 0.0}
    theirs = joints.RNNTJoint(sizes | options, num_classes=6, fuse_loss_wer=True, fused_batch_size=2)
    loss = losses.RNNTLoss(6, "mean_batch", "pytorch", {})
    loss._force_float32 = False
    theirs.set_loss(loss), theirs.set_wer(torch.nn.Identity())
    ours = swapped(moved(theirs, 0.3))
    if what == "hooks":
        ours.joint_net[-1].register_forward_hook(lambda *_: None)
    if what == "clamp":
        ours.loss._loss.clamp = theirs.loss._loss.clamp = 1e9
    if what == "temperature":
        ours.temperature = theirs.temperature = 1.5
    frames, symbols = torch.tensor([7, 5, 6]), torch.tensor([3, 1, 2])
    draw = numbers("batch")
    call = {
        "encoder_outputs": torch.randn(3, 5, 7, generator=draw),
        "decoder_outputs": torch.randn(3, 4, 4, generator=draw),
        "encoder_lengths": frames,
        "transcripts": torch.randint(0, 6, (3, 3), generator=draw),
        "transcript_lengths": symbols,
    }

    def run(joint):
        seeded("dropout")
        return joint.train(what == "draws")(**call)[0]

    return beside(
        ours,
        theirs,
        run,
        "forward",
        reason,
        gradients=True,
        known=what != "draws",
        level=logging.INFO if what == "draws" else logging.WARNING,
        around=fastasr.upstream_draws,
    )


# --------------------------------------------------------------------------- weights in fewer bits
@cases()
def reduced_weights():
    """float64 reads the parameter itself, rounded as the model has it."""
    seeded(0)
    theirs = torch.nn.Sequential(torch.nn.Linear(160, 160)).eval()
    ours = swapped(theirs, weights="int8")
    weight = ours[0].weight
    x = torch.randn(4, 160)
    assert weight.numel() > 2**14
    return beside(
        ours,
        theirs,
        lambda model: fastasr.ops.linear(x, model[0].weight[:80], model[0].bias[:80]),
        "0.weight.product",
        "float32 weights multiply a part of it",
    )


# --------------------------------------------------------------------------- recorded calls
ROW = {"mel_bins": 16, "width": 16, "layers": 1, "heads": 2, "hidden": 16, "channels": 4, "layer_drop": 0.0}


@cases(part="submodules have hooks", saved="saved tensors have hooks")
def recorded(what, reason):
    """A hook on a part, and hooks on saved tensors, as checkpointing has them."""
    seeded(0)
    theirs = FastConformerEncoder(**ROW).eval()
    ours = swapped(theirs, graphs=fastasr.Graphs(after=0, recorder=TapeRecorder))
    if what == "part":
        ours.layers[0].register_forward_hook(lambda *_: None)
    hooks = torch.autograd.graph.saved_tensors_hooks if what == "saved" else contextlib.nullcontext
    x = torch.randn(2, 24, 16)

    def run(model):
        with hooks(*[lambda t: t] * 2) if what == "saved" else hooks():
            return model(x)[0]

    level = logging.INFO if what == "saved" else logging.WARNING
    return beside(ours, theirs, run, "forward", reason, gradients=True, level=level)


@cases()
def larger_than_a_row():
    seeded(0)
    theirs = FastConformerEncoder(**ROW).eval()
    theirs.ragged = True
    row = fastasr.Graphs(frames=40, recordings=2, recorder=TapeRecorder)
    ours, x = swapped(theirs, ragged=True, graphs=row), torch.randn(2, 24, 16)
    reason = "it has more frames than Graphs(frames=40) allows"
    return beside(
        ours, theirs, lambda model: model(x)[0], "forward", reason, gradients=True, level=logging.INFO
    )


# --------------------------------------------------------------------------- the tests
@pytest.mark.parametrize("name", CASES)
def test_a_way_back(name, caplog):
    check(CASES[name](), caplog)


def test_no_way_back_is_missing(monkeypatch):
    made = (make() for make in CASES.values())
    assert unreached(made, monkeypatch, conformers=False) == set()
