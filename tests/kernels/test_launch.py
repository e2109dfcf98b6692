# SPDX-License-Identifier: Apache-2.0
"""Every launch of every Triton kernel goes to the device of its tensors. A fake GPU stands for the driver."""

import ast
import math
import re
import sys
from collections import Counter
from functools import cache
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from steps import Calls

from fastasr.benchmarks.device.checks import launch as launch_samples
from fastasr.ops._dispatch import gpu_backends
from fastasr.testing.table import Make, forward_and_backward, is_gradient, samples_of, table, with_tensors
from tests.kernels.configurations import KERNELS

pytest.importorskip("triton")
from triton import knobs

from fastasr.kernels import bypass, rnnt_joiner, zipformer_attention
from fastasr.kernels._launch import cdiv, generation, launch, next_power_of_2
from fastasr.testing.fake_gpu import fake_gpu

TRITON = {op for op, backend in gpu_backends().items() if backend == "triton"}
TABLES = {name: table(name) for name in TRITON}
# Op -> kernels of a forward and of a backward pass in bfloat16 at the sizes of a benchmark: launches, and torch's calls
# that compute on a GPU. Every tensor with dimensions has a gradient. A change that lowers a count lowers it here.
COUNTS = {
    "add_norm": (1, 2),
    "add_two_norms": (1, 3),
    "balancer_gradient": (2, 0),
    "batch_norm_activation": (2, 2),
    "bias_norm": (1, 2),
    "bypass": (1, 2),
    "clamped_linear": (5, 9),
    "conv_spatial_gate": (2, 7),
    "conv_subsampling": (1, 5),
    "depthwise_conv2d": (2, 4),
    "depthwise_conv_residual": (2, 4),
    "gated_depthwise_conv": (2, 5),
    "gated_residual_norm": (1, 2),
    "layer_norm_lstm": (5, 12),
    "linear_activation": (2, 4),
    "nonlin_attention": (3, 4),
    "norm_activation": (1, 2),
    "rel_attention": (1, 7),
    "residual_norm": (1, 2),
    "rnnt_joiner": (3, 6),
    "rnnt_lattice": (3, 5),
    "rnnt_pruned_lattice": (3, 3),
    "segment_attention": (1, 2),
    "swoosh_l": (1, 1),
    "swoosh_linear": (2, 5),
    "swoosh_r": (1, 1),
    "tdt_joiner": (4, 7),
    "tdt_lattice": (2, 7),
    "toeplitz_attention": (2, 12),
    "whitening_gradient": (4, 0),
    "zipformer_attention": (2, 6),
    "zipformer_attention_weights": (3, 5),
}
# arguments of bypass.forward_kernel
NO_ROW, TILE = (None,) * 3, {"BLOCK_R": 8, "BLOCK_C": 256, "num_warps": 4}


@cache
def _launches(op: str) -> frozenset[tuple[str, int, int]]:
    """Returns (kernel, device, stream) of every launch that compute-sanitizer sees of an op, with tensors on a device
    that is not the current one: first calls, and calls of what was compiled before.
    """
    with fake_gpu(home=1) as gpu:
        for _ in range(2):
            launch_samples(op, "cpu")
        assert gpu.current == 0
        names = ((f"{one.kernel.__module__}.{one.kernel.__name__}", one) for one in gpu.launches)
        return frozenset((name, one.device, one.stream) for name, one in names)


@pytest.mark.parametrize("op", sorted(TABLES))
def test_launches_go_to_the_device_of_the_tensors(op):
    assert _launches(op)
    assert {(device, stream) for _, device, stream in _launches(op)} == {(1, 1001)}


@pytest.mark.skipif(not torch.__version__.startswith("2.13."), reason="counts are those of torch 2.13")
@pytest.mark.parametrize("op", sorted(TABLES))
def test_kernels_of_a_call(op, monkeypatch):
    for module in (
        "_joiner",
        "_lattice",
        "rnnt_pruned_lattice",
        "tdt_lattice",
    ):  # values on a GPU are not checked
        monkeypatch.setattr(sys.modules[f"fastasr.ops.{module}"], "values_are_checked", lambda x: False)
    function, made = TABLES[op].function, samples_of(op).sized().arguments(Make(torch.bfloat16))
    wanted = not is_gradient(function)
    arguments = with_tensors(made, lambda _, t: t.requires_grad_(wanted and t.dim() > 0))
    with fake_gpu() as gpu:
        with (ahead := Calls()):
            y = function(**arguments)
        count = len(gpu.launches)
        results = [t for t in (y if isinstance(y, tuple) else (y,)) if t.requires_grad]
        leaves = [t for t in arguments.values() if isinstance(t, torch.Tensor) and t.requires_grad]
        grads = [torch.ones_like(t) for t in results]
        with (back := Calls()):
            if results:
                torch.autograd.grad(results, leaves, grads, allow_unused=True)
        found = ahead.kernels + count, back.kernels + len(gpu.launches) - count
    assert found == COUNTS.get(op), (
        f"torch: {ahead.found}, {back.found}; launches: {Counter(one.name for one in gpu.launches)}"
    )


def test_every_kernel_was_launched():
    """A kernel that a launcher names is one that the samples reach, so that the test above sees it."""
    launched = {kernel for op in TABLES for kernel, *_ in _launches(op)}
    named = set()
    for name in (file.stem for file in KERNELS.glob("*.py")):
        module = import_module(f"fastasr.kernels.{name}")
        text = (KERNELS / f"{name}.py").read_text()
        found = re.findall(r"\b(?:(\w+)\.)?(\w+(?:_kernel|_flat|_tile))\b(?!\()", text)
        kernels = {getattr(getattr(module, holder, module), kernel, None) for holder, kernel in found}
        own = (
            k
            for k in kernels
            if hasattr(k, "arg_names") and (k.__name__.endswith("_kernel") or k.__module__ == module.__name__)
        )
        named |= {f"{k.__module__}.{k.__name__}" for k in own}
    assert named == launched


def _is_jitted(node) -> bool:
    return isinstance(node, ast.FunctionDef) and any(
        "triton.jit" in ast.unparse(d) for d in node.decorator_list
    )


def _slow_arithmetic(node):
    """Returns where host code under ``node`` names Triton's cdiv or next_power_of_2, and imports from triton."""
    for child in ast.iter_child_nodes(node):
        if not _is_jitted(child):
            if isinstance(child, ast.Attribute) and child.attr in ("cdiv", "next_power_of_2"):
                yield child.lineno, ast.unparse(child)
            if isinstance(child, ast.ImportFrom) and child.module == "triton":
                yield child.lineno, ast.unparse(child)
            yield from _slow_arithmetic(child)


def test_host_code_counts_without_triton():
    """Triton's own functions take 2.5 to 4.3 us a call there, those of _launch 0.06."""
    found = {
        f"{file.name}:{line}: {what}"
        for file in KERNELS.glob("*.py")
        for line, what in _slow_arithmetic(ast.parse(file.read_text()))
    }
    assert not found


def test_arithmetic_of_launchers():
    for n in range(1, 200):
        assert cdiv(n, 7) == math.ceil(n / 7)
        assert next_power_of_2(n) == 2 ** math.ceil(math.log2(n))


def test_tensors_on_two_devices_are_refused():
    x, scale = torch.zeros(4, 64), torch.zeros(64)
    with fake_gpu() as gpu:
        gpu.elsewhere[scale.data_ptr()] = 1
        with pytest.raises(
            ValueError, match="forward_kernel: expected tensors on one CUDA device, got X_ORIG on"
        ):
            launch(bypass.forward_kernel, (1,), x, x, scale, *NO_ROW, x, 4, 64, **TILE)
        assert not gpu.launches


def test_a_kernel_is_compiled_once_for_what_selects_its_code():
    """Dtypes, alignment, numbers that are 1 or multiples of 16, constants and the device select the code."""

    def run(x, scale, rows, columns, block=8):
        arguments = x, x, scale, *NO_ROW, torch.empty_like(x), rows, columns
        launch(bypass.forward_kernel, (1,), *arguments, **TILE | {"BLOCK_R": block})

    x, scale = torch.zeros(80), torch.zeros(64)
    with fake_gpu() as gpu:

        def compiled() -> int:
            return sum(len(cache[0]) for cache in bypass.forward_kernel.device_caches.values())

        run(x, scale, 4, 64)
        run(x, scale, 5, 128)  # rows are not specialized
        assert compiled() == 1
        for count, call in enumerate(
            (
                (x.bfloat16(), scale, 4, 64),
                (x[1:], scale, 4, 64),
                (x, scale, 4, 63),
                (x, scale, 4, 1),
                (x, scale, 2**31, 64),
                (x, scale, 4, 64, 16),
            ),
            start=2,
        ):
            run(*call)
            run(*call)
            assert compiled() == count
        gpu.home = 1
        run(x, scale, 4, 64)
        assert set(bypass.forward_kernel.device_caches) == {0, 1}
        # both ways to launch give the driver the same arguments but for the new tensor
        first, second = _addresses(gpu.launches[2]), gpu.launches[3].arguments
        assert [a == b for a, b in zip(first, second, strict=True)].count(False) <= 1


def test_tiles_are_those_of_the_devices_generation():
    """Tiles for products that read shared memory, which spill on others, are for capabilities 9.0 and 10.x alone: those
    of toeplitz_attention with dropout."""
    (dropout,) = (sample for sample in TABLES["toeplitz_attention"].samples if sample.name == "dropout")
    expected = {80: 80, 86: 80, 89: 80, 90: 90, 100: 100, 103: 100, 110: 80, 120: 120, 121: 120}
    tiles = {}
    for capability, found in expected.items():
        with fake_gpu(capability=divmod(capability, 10)) as gpu:
            assert generation(torch.zeros(1)) == found
            forward_and_backward(TABLES["toeplitz_attention"], dropout, torch.bfloat16)
            (forward,) = (one for one in gpu.launches if one.kernel.__name__ == "forward_kernel")
            tiles[capability] = dict(zip(forward.kernel.arg_names, forward.arguments, strict=True))["BLOCK_N"]
    assert {capability for capability, columns in tiles.items() if columns == 64} == {90, 100, 103}


@pytest.mark.parametrize(("processors", "shares"), [(1, 1), (64, 1), (108, 5), (132, 2), (640, 10)])
def test_the_joiner_shares_outputs_as_multiprocessors_take_the_fewest_turns(processors, shares):
    """63 blocks of rows and 20 tiles of outputs: 108 take 3 turns of 4 tiles, 132 one of 10."""
    p = SimpleNamespace(scores={"BLOCK_N": 256}, weight=torch.empty(0, dtype=torch.bfloat16), v=5000)
    p.blocks = lambda count: 63
    with fake_gpu(processors=processors):
        assert -(-p.v // rnnt_joiner._Plan.share(p, 8000)) == shares


@pytest.mark.parametrize(
    ("most", "places", "blocks"), [(8, 264, 6), (30, 264, 24), (3, 264, 3), (0, 264, 1), (8, 80, 8)]
)
def test_pieces_of_attention_take_the_fewest_turns(most, places, blocks):
    """24 blocks of queries and 80 pairs: 264 programs at once take 8 turns in pieces of 6 blocks, 9 in pieces of 8."""
    assert zipformer_attention.blocks_of_piece(24, 80, most, places) == blocks


@pytest.mark.parametrize("op", ["swoosh_l", "segment_attention"])  # of 9 and 38 arguments
def test_a_launch_is_triton_s_own(op):
    """kernels/_launch.py hands the driver what Triton would hand it."""
    with fake_gpu() as gpu:
        forward_and_backward(TABLES[op], TABLES[op].thorough[0], torch.bfloat16)
        first, count = gpu.launches[0], len(gpu.launches)
        names = first.kernel.arg_names
        constexprs = {first.kernel.arg_names[i] for i in first.kernel.constexprs}
        given = dict(zip(names, first.arguments, strict=True))
        arguments = [value for name, value in given.items() if name not in constexprs]
        constants = {name: given[name] for name in names if name in constexprs}
        constants |= {name: first.options[name] for name in ("num_warps", "num_stages")}
        launch(first.kernel, first.grid, *arguments, **constants)
        first.kernel[first.grid](*arguments, **constants)
        ours, tritons = gpu.launches[count:]
    for one in (ours, tritons):
        assert (one.kernel, one.grid) == (first.kernel, first.grid)
        assert _addresses(one) == _addresses(first)


@pytest.mark.parametrize("hooked", ["launch_enter_hook", "launch_exit_hook"])
def test_hooks_of_profilers_see_every_launch(hooked, monkeypatch):
    """Triton makes the first launch of what it compiled, and kernels/_launch.py the others."""
    seen = []
    x = torch.zeros(4, 64)
    chain = type(getattr(knobs.runtime, hooked))()
    chain.add(lambda metadata: seen.append(metadata.get()["name"]))

    def run():
        launch(bypass.forward_kernel, (1,), x, x, x[0], *NO_ROW, x, 4, 64, **TILE)

    with fake_gpu() as gpu:
        run()
        for hook in (chain, chain.calls[0]):
            monkeypatch.setattr(knobs.runtime, hooked, hook)
            seen.clear()
            run()
            run()
            assert seen == ["forward_kernel"] * 2
        monkeypatch.undo()
        run()
        assert len(seen) == 2
        assert len(gpu.launches) == 6


def _addresses(one):
    return [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in one.arguments]
