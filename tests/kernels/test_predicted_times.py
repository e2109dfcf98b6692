# SPDX-License-Identifier: Apache-2.0
"""The model behind the predicted times, on kernels whose times are known: a copy, and a product of matrices."""

import ctypes
from collections import defaultdict

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl

from fastasr.benchmarks import predictions
from fastasr.benchmarks.studies.predict import __main__ as study
from fastasr.benchmarks.studies.predict import cuda, model, torch_ops, trips
from fastasr.benchmarks.studies.predict.cards import CARDS
from fastasr.testing.fake_gpu import fake_gpu

pytestmark = [
    pytest.mark.needs("benchmarks", "tests/kernels"),
    pytest.mark.skipif(triton.knobs.runtime.interpret, reason="kernels are compiled here"),
]
BY_NAME = {card.name: card for card in CARDS}
# Where a step is predicted to take over 1.1 times as long as the op's definition in eager, and keeps its kernels
# all the same; "Against eager" in docs/gpu-predictions.md says why.
BEHIND_EAGER = {
    "linear_activation": {"B200"},
    "rel_attention": {"B200"},
    "residual_norm": {"H200", "B200"},
    "zipformer_attention": {"H200", "B200"},
    "zipformer_attention_weights": {"B200"},
}


@triton.jit
def copy_kernel(X, Y, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Y + at, tl.load(X + at))


@triton.jit
def product_kernel(A, B, C, n, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    r = tl.program_id(0) * M + tl.arange(0, M)
    c = tl.program_id(1) * N + tl.arange(0, N)
    total = tl.zeros([M, N], tl.float32)
    for start in range(0, n, K):
        k = start + tl.arange(0, K)
        a = tl.load(A + r[:, None] * n + k[None, :])
        b = tl.load(B + k[:, None] * n + c[None, :])
        total = tl.dot(a, b, total)
    tl.store(C + r[:, None] * n + c[None, :], total.to(C.dtype.element_ty))


@triton.jit
def nested_kernel(X, n, BOUNDS, BLOCK: tl.constexpr):
    first = tl.program_id(0).to(tl.int64)
    while first < n:
        hidden = tl.load(BOUNDS + 1, mask=first >= n, other=0)
        for start in range(0, tl.load(BOUNDS) + hidden, BLOCK):
            x = X + first * n + start + tl.arange(0, BLOCK)
            tl.store(x, tl.load(x) + 1)
        first += tl.num_programs(0)


IN_CUDA = r"""
struct Arguments { const float* x; float* y; long long rows, columns; bool twice; };
extern "C" __global__ void nested(Arguments a) {
  for (long long r = blockIdx.x; r < a.rows; r += gridDim.x) {
#pragma unroll UNROLLED
    for (long long c = threadIdx.x; c < a.columns; c += blockDim.x) a.y[c] += a.x[r * a.columns + c];
    if (a.twice) a.y[0] = a.x[r];
  }
}
extern "C" __global__ void waiting(Arguments a) {
  while (a.x[threadIdx.x] > 0) a.y[threadIdx.x]++;
}
extern "C" void start(bool waits, Arguments a) { waits ? waiting<<<2, 64>>>(a) : nested<<<2, 64>>>(a); }
"""


class Arguments(ctypes.Structure):
    _fields_ = [(n, ctypes.c_void_p) for n in "xy"] + [(n, ctypes.c_longlong) for n in ("rows", "columns")]
    _fields_ += [("twice", ctypes.c_bool)]


def _in_cuda(folder, waits, columns, unrolled=1):
    """Records the launch of a kernel on 6 rows and returns what the model makes of it."""
    source = folder / f"kernels_{waits}_{unrolled}.cu"  # a name of its own: a library is opened once
    source.write_text(IN_CUDA.replace("UNROLLED", str(unrolled)))
    library = ctypes.CDLL(str(cuda.build(source)))
    x, y = torch.zeros(6, columns), torch.zeros(columns)
    with cuda.listening(library, source) as launches:
        library.start(ctypes.c_bool(waits), Arguments(x.data_ptr(), y.data_ptr(), *x.shape, False))
    cuda.place(launches, [x, y])
    assert [(one.name, one.grid, one.threads) for one in launches] == [
        ("waiting" if waits else "nested", (2, 1, 1), 64)
    ]
    return cuda.run(launches[0], 80)


def _predict(card, kernel, grid, *arguments, **constants):
    with fake_gpu(capability=divmod(card.capability, 10), processors=card.processors) as gpu:
        kernel[grid](*arguments, **constants)
    return model.predict(gpu.launches[0], card)


@pytest.mark.parametrize("name", BY_NAME)
def test_a_copy_takes_the_time_of_its_bytes(name):
    card, x = BY_NAME[name], torch.empty(1 << 26, dtype=torch.bfloat16)
    found = _predict(card, copy_kernel, (x.numel() // 2048,), x, torch.empty_like(x), BLOCK=2048)
    assert found.bound == "memory bandwidth"
    assert found.microseconds == pytest.approx(2 * x.nbytes / card.memory / 1e3, rel=0.05)


@pytest.mark.parametrize(("name", "known"), [("A100", 230), ("H100", 580)])
def test_a_product_runs_at_the_rate_that_is_reported_for_triton(name, known):
    card, n = BY_NAME[name], 4096
    a, b, c = (torch.empty(n, n, dtype=torch.bfloat16) for _ in range(3))
    tile = (
        {"M": 128, "N": 128, "K": 32, "num_warps": 4}
        if name == "A100"
        else {"M": 128, "N": 256, "K": 64, "num_warps": 8}
    )
    found = _predict(card, product_kernel, (n // tile["M"], n // tile["N"]), a, b, c, n, **tile)
    assert 2 * n**3 / found.microseconds / 1e6 == pytest.approx(known, rel=0.3)


def test_the_products_of_the_joiner_are_those_of_a_gpu():
    """On the CPU the joiner converts both matrices to float32 first, which would count as memory traffic."""
    a, b = torch.randn(8, 16, dtype=torch.bfloat16), torch.randn(16, 4, dtype=torch.bfloat16)
    with torch_ops.Recorder() as recorder:
        y = study._product(a, b)
    assert y.dtype is torch.float32
    assert [(o.rate, o.flops, sum(o.inputs.values())) for o in recorder.operations] == [
        ("product", 2 * 8 * 16 * 4, 2 * (8 * 16 + 16 * 4))
    ]


def test_passes_of_loops_follow_grid_arguments_and_memory():
    x, bounds = torch.empty(100, 100), torch.tensor([70], dtype=torch.int32)
    with fake_gpu() as gpu:
        nested_kernel[(10,)](x, 100, bounds, BLOCK=16)
    launch = gpu.launches[0]
    arguments = dict(zip(launch.kernel.arg_names, launch.arguments, strict=True))
    body = model.compiled(launch, 90).body
    assert trips.trips(body, arguments, launch.grid) == [10, 50]  # rows of a program, and 5 blocks of each


@pytest.mark.skipif(cuda.compiler() is None, reason="there is no nvcc")
@pytest.mark.parametrize("unrolled", [1, 4])
def test_the_instructions_of_a_cuda_kernel_run_as_often_as_its_source_says(tmp_path, unrolled):
    """Two programs of two warps take 3 rows each. Of 600 columns in blocks of 64, the first lanes of the warps have 10
    and 9, however the loop is unrolled; a branch that is not taken does not count.
    """
    parts, registers, bytes_ = _in_cuda(tmp_path, False, 600, unrolled)

    def runs(head, counts):
        return sum(getattr(part, counts) for part in parts for i in part.own if i.head == head)

    assert runs("STG", "longest") == pytest.approx(3 * 10)
    assert runs("STG", "mean") == pytest.approx(3 * 9.5)
    assert runs("LDG", "longest") == pytest.approx(2 * 3 * 10)
    assert bytes_ == 4 * (6 * 600 + 600)
    assert 8 <= registers <= 64


@pytest.mark.skipif(cuda.compiler() is None, reason="there is no nvcc")
def test_a_loop_of_a_cuda_kernel_that_waits_for_memory_has_no_prediction(tmp_path):
    with pytest.raises(LookupError, match="depends on values in memory"):
        _in_cuda(tmp_path, True, 8)


def test_every_pass_has_a_prediction():
    """A new case, or a GPU that the model could not deal with, shows here and not as an empty cell."""
    wanted = {(card.name, case.op, case.name, phase) for card, case, phase in study.passes()}
    assert {tuple(row[name] for name in study.KEY) for row in predictions.rows()} == wanted


def test_what_eager_takes_is_the_sum_of_its_operations():
    """Two kernels in sequence, a LayerNorm's gradients in two, and a convolution's own kernel at its own share."""
    card, x = BY_NAME["H100"], torch.randn(2, 64, 500, requires_grad=True)
    weight, norm = torch.randn(64, 1, 61), torch.nn.LayerNorm(500)
    with torch_ops.Recorder() as recorder:
        y = norm(torch.nn.functional.conv1d(x, weight, padding=30, groups=64))
    assert [(o.rate, o.kernels) for o in recorder.operations] == [("own depthwise", 1), (None, 1)]
    convolution = recorder.operations[0]
    assert convolution.flops == 2 * x.numel() * 61
    products = [convolution.microseconds(card, eager) - torch_ops.START for eager in (False, True)]
    assert products[1] == pytest.approx(products[0] * 0.5 / 0.15)
    with torch_ops.Recorder() as recorder:
        torch.autograd.grad(y.sum(), [x, *norm.parameters()])
    kernels = {o.name: o.kernels for o in recorder.operations}
    assert kernels["native_layer_norm_backward"] == 2
    assert kernels["convolution_backward"] == 1  # only x asks for a gradient


def test_the_definition_in_eager_is_predicted_to_be_faster_only_where_the_page_says_so():
    """An op that loses is redesigned, or dispatched to its definition, or stays for a reason."""
    found = defaultdict(set)
    for step in predictions.slower_than_eager():
        found[step["op"]].add(step["device"])
    assert found == BEHIND_EAGER
