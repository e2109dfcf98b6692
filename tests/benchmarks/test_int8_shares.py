# SPDX-License-Identifier: Apache-2.0
"""The study of where the time of a model in int8 goes."""

import pytest

from fastasr.benchmarks.studies import int8_shares
from fastasr.ops import _dispatch


@pytest.mark.parametrize(
    ("name", "shapes", "part"),
    [
        ("fastasr_cpu::reduced_linear", [[199, 384], [75264], [768], [], []], int8_shares.PRODUCTS),
        ("fastasr_cpu::gemm", [[199, 384], [384, 512], []], int8_shares.PRODUCTS),
        ("fastasr_cpu::gemm", [[199, 199], [199, 288], []], int8_shares.ATTENTION),
        ("fastasr_cpu::zipformer_attention_weights_forward", [[1]], int8_shares.ATTENTION),
        ("aten::mkldnn_convolution", [[1]], "convolutions"),
        ("aten::view", [[1]], int8_shares.OTHER),
    ],
)
def test_parts(name, shapes, part):
    assert int8_shares.part_of(name, shapes) == part


@pytest.mark.skipif(bool(_dispatch.native_reason()), reason="the native library is not built")
def test_a_tiny_model(tmp_path):
    pytest.importorskip("zipformer.modules.model", exc_type=ImportError)
    page, results = tmp_path / "page.md", tmp_path / "found.json"
    page.write_text("<!-- shares:start -->\n<!-- shares:end -->\n")
    files = ["--results", str(results), "--page", str(page)]
    assert int8_shares.main([*files, "--size", "tiny", "--seconds", "1", "--calls", "1"]) == 0
    assert f"| {int8_shares.PRODUCTS} | " in page.read_text()
    assert "If the int8 products took no time" in page.read_text()
    assert int8_shares.main([*files, "--check"]) == 0
