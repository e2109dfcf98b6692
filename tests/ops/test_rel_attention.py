# SPDX-License-Identifier: Apache-2.0
"""rel_attention beyond its samples: memory, dropout, scores that are infinite or not a number."""

import subprocess
import sys

import pytest
import torch

from fastasr.ops import _weights_dropout, rel_attention
from fastasr.ops._dispatch import why_not_native
from fastasr.testing import seeded

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
    rel_attention(*rows, dropout_p=0.1, dropout_seed=torch.tensor([frames])).sum().backward()
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


@pytest.mark.skipif(bool(why_not_native()), reason="the definition keeps T x T tensors")
@pytest.mark.skipif(sys.platform != "linux", reason="Linux limits a process's data")
def test_memory_is_linear_in_time():
    done = subprocess.run([sys.executable, "-c", _PASS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_dropout_needs_a_seed():
    call = _arguments(5, torch.float32)
    rel_attention(**call, dropout_p=0.0)
    with pytest.raises(
        ValueError, match=r"rel_attention: dropout_seed: expected a Tensor where dropout_p is more"
    ):
        rel_attention(**call, dropout_p=0.1)
    with pytest.raises(ValueError, match=r"rel_attention: dropout_p"):
        rel_attention(**call, dropout_p=1.0, dropout_seed=torch.tensor([1]))


def test_a_seed_decides_which_weights_are_dropped():
    """Values that are unit vectors show the weights."""
    frames = 40
    call = _arguments(frames, torch.float64)
    call["v"] = torch.eye(frames, dtype=torch.float64)[None, :, None].expand(2, -1, 2, -1)
    weights = rel_attention(**call)
    for p, seed in ((0.1, 0), (0.5, -(2**63)), (0.9, 2**63 - 1)):
        seed = torch.tensor([seed])
        kept = _weights_dropout.kept(seed, p, 2, 2, frames, frames).transpose(1, 2)
        found = rel_attention(**call, dropout_p=p, dropout_seed=seed)
        torch.testing.assert_close(found, weights * kept / (1 - p), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("shape", [(3, 4, 100, 100), (300, 400)])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_what_is_dropped_is_a_share_without_order(p, shape):
    """The share of kept elements, of weights or of rows, and products of neighbours along each axis and of neighbouring
    seeds, are as far from their mean as those of independent draws are. The seeds are fixed."""
    for seed in (0, 1, 2**32, -5):
        kept, other = (
            _weights_dropout.kept(torch.tensor([seed + more]), p, *shape).double() for more in (0, 1)
        )
        z, other = ((t - (1 - p)) / (p * (1 - p)) ** 0.5 for t in (kept, other))
        pairs = [(z, torch.ones_like(z)), (z, other)]
        pairs += [(z.narrow(a, 0, n - 1), z.narrow(a, 1, n - 1)) for a, n in enumerate(z.shape)]
        for a, b in pairs:
            assert abs((a * b).mean()) * a.numel() ** 0.5 < 4  # standard deviations


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
