# SPDX-License-Identifier: Apache-2.0
"""Writes the ONNX files of a recogniser, by tracing.

Our encoder is traced by its plain definition (``fastasr.asr.export.plain``), upstream's by its own code. Export a model
that ``fastasr.accelerate`` has swapped inside ``fastasr.eager_mode``.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastasr import files
from fastasr.asr.export import metadata, wrappers

OPSET = 13
STATE_NAMES = (
    "cached_key",
    "cached_nonlin_attn",
    "cached_val1",
    "cached_val2",
    "cached_conv1",
    "cached_conv2",
)
STATE_BATCH = (1, 1, 1, 1, 0, 0)  # the batch dimension of each state


@torch.no_grad()
def export_onnx(
    model: Any,
    folder: Path | str,
    suffix: str = "",
    feature_dim: int | None = None,
    int8: bool = False,
    reduce_range: bool = False,
) -> dict[str, Path]:
    """Writes the ONNX files of ``model``, an AsrModel of this package or of upstream's, in eval mode on the CPU.

    A transducer becomes the files ``encoder``, ``decoder`` and ``joiner``, a CTC output the file ``ctc``, which has the
    encoder in it. A causal model, which must have one chunk_size and one left_context_frames, becomes streaming files;
    any other model becomes files for whole utterances. The batch size is free in all files, the number of frames only
    in those for whole utterances.

    Args:
        folder: the folder for the files; it is made if it is missing. Files are called ``encoder-SUFFIX.onnx`` and so
            on. A complete file replaces one of the same name.
        feature_dim: channels of the features; by default the multiple of eight that gives the front end its width.
        int8: whether to write a dynamically quantised file beside each file, ``encoder-SUFFIX.int8.onnx`` and so on:
            the weights of matrix products, and the decoder's embedding, in 8 bits.
        reduce_range: whether these weights take 7 bits only, for x86 processors without VNNI. There onnxruntime adds
            two products of 8 bits in 16 bits, which saturate.

    Returns the files as {"encoder": path, ...}, with int8 also as {"encoder.int8": path, ...}. Raises ValueError for a
    model that cannot be exported and for ``reduce_range`` without ``int8``, ImportError if a package is missing.
    """
    if reduce_range and not int8:
        raise ValueError("export_onnx: reduce_range is about int8 weights: expected int8=True, got False")
    _check(model)
    quantise = _quantiser(reduce_range) if int8 else None
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    channels = feature_dim or wrappers.bins_of(model.encoder_embed)
    ending = f"-{suffix}.onnx" if suffix else ".onnx"
    written = {}
    parts = model.encoder, model.encoder_embed

    def path(name: str) -> Path:
        written[name] = folder / f"{name}{ending}"
        return written[name]

    whole = wrappers.OnnxEncoderWrapper, wrappers.OnnxCtcWrapper, _write_whole
    streaming = wrappers.OnnxStreamingEncoderWrapper, wrappers.OnnxStreamingCtcWrapper, _write_streaming
    encoder_of, ctc_of, write = streaming if model.encoder.causal else whole
    if model.decoder is not None:
        write(encoder_of(*parts, model.joiner.encoder_proj), path("encoder"), channels, False)
        _write_decoder(model, path("decoder"))
        _write_joiner(model, path("joiner"))
    if model.ctc_output is not None:
        write(ctc_of(*parts, model.ctc_output), path("ctc"), channels, True)
    if quantise is not None:
        for name, file in list(written.items()):
            written[f"{name}.int8"] = file.with_suffix(".int8.onnx")
            quantise(file, written[f"{name}.int8"])
    return written


def _quantiser(reduce_range: bool) -> Callable[[Path, Path], None]:
    """Returns a function (file, quantised file)."""
    try:
        from onnxruntime.quantization import QuantType, quantize_dynamic
    except ImportError as error:
        raise ImportError(
            f'export_onnx: int8=True needs onnx and onnxruntime ({error}): pip install "fastasr[asr]"'
        ) from None

    def quantise(file: Path, quantised: Path) -> None:
        # a product of the embedding is a lookup, which ONNX calls Gather
        operators = ["MatMul", "Gather"] if file.name.startswith("decoder") else ["MatMul"]
        with files.replacing(quantised) as unfinished:
            quantize_dynamic(
                file,
                unfinished,
                op_types_to_quantize=operators,
                reduce_range=reduce_range,
                weight_type=QuantType.QInt8,
            )

    return quantise


def _check(model: Any) -> None:
    missing = [
        name for name in ("encoder_embed", "encoder", "decoder", "ctc_output") if not hasattr(model, name)
    ]
    if missing:
        raise ValueError(
            f"export_onnx: expected an AsrModel, got {type(model).__name__} without {', '.join(missing)}"
        )
    if model.training:
        raise ValueError("export_onnx: expected a model in eval mode: call model.eval()")
    device = next(model.parameters()).device
    if device.type != "cpu":
        raise ValueError(f"export_onnx: expected a model on the CPU, got one on {device}")
    if next(model.parameters()).dtype is not torch.float32:
        raise ValueError(f"export_onnx: expected float32 parameters, got {next(model.parameters()).dtype}")


def _write_whole(wrapper: Any, path: Path | str, channels: int, ctc: bool) -> None:
    x = torch.zeros(2, 100, channels, dtype=torch.float32, device="cpu")
    x_lens = torch.tensor([100, 80], dtype=torch.int64, device="cpu")
    outputs = ["log_probs", "log_probs_len"] if ctc else ["encoder_out", "encoder_out_lens"]
    names = ["x", "x_lens", *outputs]
    axes = {
        name: {0: "N"} if "len" in name else {0: "N", 1: "T" if name == "x" else "frames"} for name in names
    }
    _write(wrapper, (x, x_lens), path, names[:2], outputs, axes, metadata.whole(ctc))


def _write_streaming(wrapper: Any, path: Path | str, channels: int, ctc: bool) -> None:
    wrapper.eval()
    x = torch.rand(
        2, 2 * wrapper.chunk_size + wrapper.pad_length, channels, dtype=torch.float32, device="cpu"
    )
    states = wrapper.get_init_states(2)
    inputs, axes = ["x"], {"x": {0: "N"}}
    for layer in range((len(states) - 2) // len(STATE_NAMES)):
        for name, dimension in zip(STATE_NAMES, STATE_BATCH, strict=True):
            inputs.append(f"{name}_{layer}")
            axes[inputs[-1]] = {dimension: "N"}
    for name in ("embed_states", "processed_lens"):
        inputs.append(name)
        axes[name] = {0: "N"}
    outputs = ["log_probs" if ctc else "encoder_out", *(f"new_{name}" for name in inputs[1:])]
    axes |= {f"new_{name}": axes[name] for name in inputs[1:]} | {outputs[0]: {0: "N"}}
    _write(wrapper, (x, states), path, inputs, outputs, axes, metadata.streaming(wrapper, ctc))


def _write_decoder(model: Any, path: Path | str) -> None:
    wrapper = wrappers.OnnxDecoderWrapper(model.decoder, model.joiner.decoder_proj)
    y = torch.zeros(10, model.decoder.context_size, dtype=torch.int64, device="cpu")
    axes = {"y": {0: "N"}, "decoder_out": {0: "N"}}
    _write(wrapper, (y,), path, ["y"], ["decoder_out"], axes, metadata.decoder(model))


def _write_joiner(model: Any, path: Path | str) -> None:
    wrapper = wrappers.OnnxJoinerWrapper(model.joiner.output_linear)
    inputs = (
        torch.rand(11, model.joiner.output_linear.in_features, dtype=torch.float32, device="cpu"),
        torch.rand(11, model.joiner.output_linear.in_features, dtype=torch.float32, device="cpu"),
    )
    names = ["encoder_out", "decoder_out"]
    axes = {name: {0: "N"} for name in (*names, "logit")}
    _write(wrapper, inputs, path, names, ["logit"], axes, metadata.joiner(model))


def _write(
    wrapper: Any,
    inputs: tuple,
    path: Path | str,
    input_names: list[str],
    output_names: list[str],
    axes: dict[str, dict[int, str]],
    fields: dict[str, str],
) -> None:
    import onnx

    with files.replacing(path) as unfinished, warnings.catch_warnings():
        # The tracer warns of every Python branch, but upstream's branches on shapes are only checks. This exporter is
        # deprecated, but fastasr keeps it.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.filterwarnings("ignore", message="Constant folding", category=UserWarning)
        torch.onnx.export(
            wrapper.eval(),
            inputs,
            str(unfinished),
            dynamo=False,
            opset_version=OPSET,
            input_names=input_names,
            output_names=output_names,
            dynamic_axes=axes,
        )
        written = onnx.load(str(unfinished))
        for key, value in fields.items():
            entry = written.metadata_props.add()
            entry.key, entry.value = key, value
        onnx.save(written, str(unfinished))
