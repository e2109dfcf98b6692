# SPDX-License-Identifier: Apache-2.0
"""The cache of measured products: of another machine or version it is not read, and a damaged one does no harm."""

import json
import os
import random
import subprocess
import sys

import children
import pytest
import torch

from fastasr.ops import _gemm

needs_both = pytest.mark.skipif(bool(_gemm.why_not()), reason=_gemm.why_not())
COUNTS = [pytest.param(40, id="40"), pytest.param(1000, id="1000", marks=pytest.mark.long)]
X86 = "model name\t: Some CPU\ncpu family\t: 6\nmodel\t\t: 143\ncpu MHz\t\t: 2000\nflags\t\t: sse2 avx2 avx512f\n"
ARM = "processor\t: 0\nBogoMIPS\t: 50\nFeatures\t: fp asimd\nCPU implementer\t: 0x41\nCPU part\t: 0xd0c\n"


@pytest.mark.parametrize(
    ("facts", "part", "other", "same"),
    [
        (X86, " avx512f", "", False),
        (X86, "Some CPU", "Another CPU", False),
        (X86, "143", "85", False),
        (X86, "2000", "3100", True),  # clocks change all the time
        (ARM, "asimd", "asimd sve", False),
        (ARM, "0xd0c", "0xd40", False),
        (ARM, "50", "100", True),
    ],
)
def test_another_processor_has_another_file(tmp_path, facts, part, other, same):
    (tmp_path / "one").write_text(facts + "\n" + facts)
    (tmp_path / "two").write_text(facts.replace(part, other))
    assert (_gemm._machine(tmp_path / "one") == _gemm._machine(tmp_path / "two")) == same


@needs_both
def test_another_instruction_set_torch_or_revision_has_another_file(monkeypatch):
    widest = _gemm.cache_file().name
    code = "from fastasr.ops import _gemm; print(_gemm.cache_file().name)"
    environment = {**os.environ, "FASTASR_SIMD": "portable"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() != widest
    monkeypatch.setattr(_gemm, "_REVISION", _gemm._REVISION - 1)
    older = _gemm.cache_file().name
    monkeypatch.setattr(torch, "__version__", "2.11.0+cpu")
    assert len({widest, older, _gemm.cache_file().name}) == 3


@needs_both
@pytest.mark.parametrize("count", COUNTS)
def test_damaged_files(tmp_path, monkeypatch, count):
    """Products are right whatever the file says, and the next choice makes it whole."""
    monkeypatch.setenv("FASTASR_CACHE", str(tmp_path))
    monkeypatch.setenv("FASTASR_GEMM", "auto")
    monkeypatch.setattr(_gemm, "_timed", lambda product, *_: float(product == "torch"))
    _gemm.forget()  # what other tests of this process have chosen
    draw = random.Random(torch.initial_seed())
    x, w = (torch.randint(-9, 9, (64, 64)).float() for _ in range(2))
    calls = {"forward": (_gemm.forward, x, w, None), "input_grad": (_gemm.input_grad, x, w)}
    calls |= {"weight_grad": (_gemm.weight_grad, x, w)}
    expected = {name: f(*operands) for name, (f, *operands) in calls.items()}
    whole = json.loads(_gemm.cache_file().read_text())
    assert len(whole) == 3
    texts = [
        json.dumps({key: entry | changes for key, entry in whole.items()}, indent=1)
        for product in ("few rows", "native", "onednn")
        for changes in ({"product": product}, {"product": product, "under_load": True, "at": 1.8e9})
    ]
    texts.append(json.dumps(dict.fromkeys(whole, "native"), indent=1))  # as older versions wrote it
    damaged = [children.mutated_text(draw.choice(texts), draw) for _ in range(count)]
    for content in [*(text.encode() for text in texts), b'[[1, "torch"], ["a", 2]]', b"[" * 30000, *damaged]:
        _gemm.cache_file().write_bytes(content)
        _gemm.forget()
        for name, (f, *operands) in calls.items():
            assert torch.equal(f(*operands), expected[name]), content
        _gemm.forward(x[:32], w, None)  # a new choice
        assert isinstance(json.loads(_gemm.cache_file().read_text()), dict)
        _gemm.cache_file().unlink()
    _gemm.forget()
