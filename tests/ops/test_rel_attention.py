# SPDX-License-Identifier: Apache-2.0
"""rel_attention beyond its samples: memory, and scores that are infinite or not a number."""

import subprocess
import sys

import pytest
import torch

from fastasr.ops import rel_attention
from fastasr.ops._dispatch import native_reason
from fastasr.testing import seeded

pytestmark = pytest.mark.needs()

INF, NAN = float("inf"), float("nan")

# It runs one pass forward and backward over T frames, in the memory of T x T / 4 floats beyond what it had before.
_PASS = """
import re, resource, torch
from fastasr.ops import rel_attention
torch.set_num_threads(1)
def run(frames):
    rows = [torch.randn(1, frames, 1, 8, requires_grad=True) for _ in range(3)]
    rows += [torch.randn(2 * frames - 1, 1, 8, requires_grad=True)]
    rows += [torch.randn(1, 8, requires_grad=True) for _ in range(2)]
    rel_attention(*rows).sum().backward()
run(64)
frames = 6000
data = int(re.search(r"VmData:\\s*(\\d+)", open("/proc/self/status").read())[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (data + frames * frames, resource.RLIM_INFINITY))
try:
    torch.empty(frames, frames)
except RuntimeError:
    run(frames)
else:
    raise SystemExit("the limit does not hold")
"""


@pytest.mark.skipif(bool(native_reason()), reason="the definition keeps T x T tensors")
@pytest.mark.skipif(sys.platform != "linux", reason="Linux limits a process's data")
def test_memory_is_linear_in_time():
    done = subprocess.run([sys.executable, "-c", _PASS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def _arguments(frames: int, dtype: torch.dtype) -> dict:
    generator = torch.Generator().manual_seed(seeded(frames))
    names = dict.fromkeys("qkv", (2, frames, 2, 3)) | {"pos": (2 * frames - 1, 2, 3)}
    names |= dict.fromkeys(("bias_u", "bias_v"), (2, 3))
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in names.items()}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_extreme_scores(dtype, masked):
    """The same rows become NaN or infinite as in the definition."""
    for frames in (1, 5, 40):
        for value in (INF, -INF, NAN, 3e4, -3e4):
            for name in ("q", "k", "pos"):
                call = _arguments(frames, dtype)
                call[name].flatten(0, -2)[call[name].flatten(0, -2).shape[0] // 2, 1] = value
                masks = {}
                if masked:
                    masks["key_padding_mask"] = torch.arange(frames) >= torch.tensor(
                        [[frames], [frames // 2]]
                    )
                out = rel_attention(**call, **masks)
                wide = rel_attention.definition(**{k: t.double() for k, t in call.items()}, **masks)
                torch.testing.assert_close(
                    out.double(), wide, rtol=0, equal_nan=True,
                    atol={torch.float64: 1e-12, torch.float32: 2e-2, torch.bfloat16: 5e-2}[dtype],
                    msg=lambda text, at=(frames, value, name): f"{at}: {text}",
                )  # fmt: skip


@pytest.mark.parametrize("frames", [1, 16, 33])
def test_scores_of_negative_infinity_alone_are_not_a_number(frames):
    call = {k: torch.ones_like(t) for k, t in _arguments(frames, torch.float32).items()}
    call["k"][..., 0] = -INF
    assert rel_attention(**call).isnan().all()
    hidden = torch.ones(2, frames, dtype=torch.bool)
    assert (rel_attention(**call, key_padding_mask=hidden) == 0).all()
