# SPDX-License-Identifier: Apache-2.0
r"""The PTX that Triton compiles of the kernels computes what they should, on an emulated GPU (tests/kernels/ptx): the
interpreter runs their source, and knows neither layouts, nor fused operations, nor approximations, nor inline assembly.

A run checks two samples of an op, which SEED chooses, on one architecture. To check all samples and dtypes
of an op, which takes minutes:

    OP=bypass ARCHITECTURE=80 FASTASR_TEST_BACKEND=triton python -m pytest -p tests.kernels.ptx.plugin \
        tests/ops/test_contract.py
"""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from inner import interpreted

from fastasr.ops import _dispatch
from fastasr.testing.checks import cases
from fastasr.testing.seeds import seeded
from fastasr.testing.table import table

pytest.importorskip("triton")

import triton
import triton.language as tl

from fastasr.kernels._special import exp2, reciprocal
from tests.kernels.ptx.gpu import emulated_gpu
from tests.kernels.ptx.machine import Machine
from tests.kernels.ptx.memory import Fault, Global
from tests.kernels.ptx.program import read

ARCHITECTURES = (80, 90)
on_each = pytest.mark.parametrize(
    "capability", [divmod(a, 10) for a in ARCHITECTURES], ids=lambda c: f"sm_{c[0]}{c[1]}"
)


@triton.jit
def softmax_of_product(A, B, Y, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    at = i[:, None] * SIZE + i[None, :]
    scores = tl.dot(tl.load(A + at), tl.trans(tl.load(B + at)))
    e = tl.exp(scores - tl.max(scores, axis=1)[:, None])
    tl.store(Y + at, e / tl.sum(e, axis=1)[:, None])


@triton.jit
def power_and_reciprocal(X, Y, Z, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(X + i)
    tl.store(Y + i, exp2(x))
    tl.store(Z + i, reciprocal(x))


@triton.jit(do_not_specialize=["shift"])
def add_one(X, Y, shift, count, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + tl.max_contiguous(tl.multiple_of(shift + i, 4), 4), mask=i < count)
    tl.store(Y + i, x + 1, mask=i < count)


@on_each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("warps", [2, 4, 8])
def test_a_product_and_a_softmax(capability, dtype, warps):
    torch.manual_seed(0)
    a, b = torch.randn(2, 64, 64, dtype=torch.float64).to(dtype)
    y = torch.empty(64, 64)
    with emulated_gpu(capability=capability):
        softmax_of_product[(1,)](a, b, y, SIZE=64, num_warps=warps, allowed_dot_input_precisions=("ieee",))
    torch.testing.assert_close(y.double(), (a.double() @ b.double().T).softmax(1), rtol=1e-5, atol=1e-6)


def test_exponentials_and_reciprocals():
    x = torch.cat(
        [torch.linspace(-126, 127, 1016), torch.tensor([-200.0, -127.5, 200.0, 0.0, -0.0, 1e30, np.nan, 1])]
    )
    y, z = torch.empty_like(x), torch.empty_like(x)
    with emulated_gpu():
        power_and_reciprocal[(1,)](x, y, z, BLOCK=len(x))
    torch.testing.assert_close(y[:1016].double(), x[:1016].double().exp2(), rtol=2**-22, atol=0)
    torch.testing.assert_close(z[:1016].double(), 1 / x[:1016].double(), rtol=2**-23, atol=0)
    assert y[1016:1019].tolist() == [0, 0, np.inf]
    assert z[1019:1021].tolist() == [np.inf, -np.inf]
    assert y[1022].isnan()
    assert z[1022].isnan()


def test_a_load_behind_a_tensor_is_found():
    x, y = torch.zeros(256, dtype=torch.float32), torch.zeros(256, dtype=torch.float32)
    with emulated_gpu():
        add_one[(2,)](x, y, 0, 256, BLOCK=128)
        assert (y == 1).all()
        with pytest.raises(
            Fault, match=r"add_one: an access of \d+ bytes ends 32 bytes behind a tensor: ld\.global"
        ):
            add_one[(2,)](x, y, 8, 256, BLOCK=128)


def test_an_unaligned_load_is_found():
    x, y = torch.zeros(256, dtype=torch.float32), torch.zeros(256, dtype=torch.float32)
    with emulated_gpu(), pytest.raises(Fault, match="a load of 16 bytes is not aligned"):
        add_one[(1,)](x, y, 1, 128, BLOCK=512)


HEAD = (
    ".visible .entry k(\n.param .u64 x,\n.param .u64 y\n)\n{\nld.param.b64 %x, [x];\nld.param.b64 %y, [y];\n"
)
LANE = "mov.u32 %t, %tid.x;\nmul.wide.u32 %o, %t, 4;\nadd.s64 %x, %x, %o;\nadd.s64 %y, %y, %o;\nshl.b32 %s, %t, 2;\n"


def _run(body: str, x: torch.Tensor, y: torch.Tensor) -> None:
    memory = Global([(t.data_ptr(), 4 * t.numel()) for t in (x, y)])
    machine = Machine(read(HEAD + LANE + body + "\nret;\n}"), 64, 256, memory, [x.data_ptr(), y.data_ptr()])
    machine.run((1, 1, 1))


COPY = "cp.async.ca.shared.global [ %s + 0 ], [ %x + 0 ], 0x4, 4;\ncp.async.commit_group;\n"
BACK = "ld.shared.b32 %v, [%s];\nst.global.b32 [ %y + 0 ], { %v };"


def test_a_copy_is_there_once_the_kernel_has_waited_for_it():
    x, y = torch.randn(64), torch.zeros(64)
    _run(COPY + "cp.async.wait_group 0;\n" + BACK, x, y)
    assert torch.equal(x, y)
    _run(COPY + BACK + "\ncp.async.wait_group 0;", x, y)
    assert y.isnan().all()
    with pytest.raises(Fault, match="ends before its copies do"):
        _run(COPY + BACK, x, y)


def test_shared_memory_is_nan_until_it_is_written():
    y = torch.zeros(64)
    _run(BACK, torch.zeros(64), y)
    assert y.isnan().all()


APART = """
setp.lt.u32 %p, %t, 48;
@%p bra $L;
mov.b32 %v, 0f40000000;
bra.uni $M;
$L:
mov.b32 %v, 0f3F800000;
$M:
"""


def test_threads_that_branch_apart_meet_again():
    y = torch.zeros(64)
    _run(APART + "bar.sync 0;\nst.global.b32 [ %y + 0 ], { %v };", torch.zeros(64), y)
    assert torch.equal(y, torch.where(torch.arange(64) < 48, 1.0, 2.0))
    with pytest.raises(Fault, match=r"some threads of a program are elsewhere: bar\.sync 0"):
        _run(APART.replace("mov.b32 %v, 0f4", "bar.sync 0;\nmov.b32 %v, 0f4"), torch.zeros(64), y)


def test_a_register_that_nobody_wrote_is_found():
    with pytest.raises(Fault, match="%v is read before it is written"):
        _run("st.global.b32 [ %y + 0 ], { %v };", torch.zeros(64), torch.zeros(64))


def test_the_trace_counts_conflicts_of_banks_and_sectors():
    from tests.kernels.ptx.trace import Trace

    x = torch.zeros(64 * 32)
    memory = Global([(x.data_ptr(), 4 * x.numel())])
    body = "mul.lo.s32 %s, %t, 128;\nst.shared.b32 [%s], %t;\nmul.wide.u32 %o, %t, 64;\nadd.s64 %x, %x, %o;\n"
    program = read(HEAD + LANE + body + "st.global.b32 [ %x + 0 ], { %t };\nret;\n}")
    machine = Machine(program, 64, 64 * 128, memory, [x.data_ptr(), x.data_ptr()])
    machine.trace = Trace(machine)
    machine.run((1, 1, 1))
    assert (machine.trace.waves.sum(), machine.trace.least_waves.sum()) == (64, 2)
    assert machine.trace.sectors.sum() == 64
    assert machine.trace.least_sectors.sum() == np.ceil(32 * 4 / 32) * 2


OPS = sorted({
    op for f in _dispatch.FAMILIES.values() for op in f.ops if any(i.backend == "triton" for i in f.implementations)
})  # fmt: skip


# Eager's product on a CPU adds shorter chains for few keys than a kernel does on a GPU, where eager's is another one.
OF_THE_CPU = ("few_keys_with_a_mean",)

FILE = str(Path(__file__).parents[1] / "ops" / "test_contract.py")


def test_the_ptx_of_an_op_keeps_the_contract(request):
    draw = random.Random(seeded("ptx"))
    op, architecture = draw.choice(OPS), draw.choice(ARCHITECTURES)
    found = [c.id for c in cases(table(op), "cpu", forced=True) if f"{op}-parity-" in c.id and not c.long]
    found = [i for i in found if not any(name in i for name in OF_THE_CPU)]
    drawn = draw.sample([i for i in found if "float16" in i], 1) + draw.sample(
        [i for i in found if "float32" in i], 1
    )
    environment = {"TRITON_INTERPRET": "0", "FASTASR_TEST_BACKEND": "triton", "OP": op}
    chosen = ("-p", "tests.kernels.ptx.plugin", *(f"{FILE}::test_contract[{i}]" for i in drawn))
    interpreted(request, *chosen, ARCHITECTURE=str(architecture), **environment)
