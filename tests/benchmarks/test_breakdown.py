# SPDX-License-Identifier: Apache-2.0
"""The study of where the time of a whole model goes."""

import json

import pytest

from fastasr.benchmarks.studies import breakdown
from fastasr.ops import _dispatch


@pytest.mark.parametrize(
    ("name", "shapes", "part"),
    [
        ("fastasr_cpu::reduced_linear", [[199, 384], [75264], [768], [], []], breakdown.PRODUCTS),
        ("fastasr_cpu::gemm", [[199, 384], [384, 512], []], breakdown.PRODUCTS),
        ("fastasr_cpu::gemm", [[199, 199], [199, 288], []], breakdown.ATTENTION),
        ("fastasr_cpu::zipformer_attention_weights_forward", [[1]], breakdown.ATTENTION),
        ("aten::mkldnn_convolution", [[1]], "convolutions"),
        ("aten::view", [[1]], breakdown.OTHER),
    ],
)
def test_parts(name, shapes, part):
    assert breakdown.part_of(name, shapes) == part


@pytest.mark.long
@pytest.mark.skipif(bool(_dispatch.why_not_native()), reason="the native library is not built")
def test_a_tiny_model(tmp_path):
    pytest.importorskip("zipformer.modules.zipformer", exc_type=ImportError)
    page, results = tmp_path / "page.md", tmp_path / "found.json"
    page.write_text("<!-- breakdown:start -->\n<!-- breakdown:end -->\n")
    files = ["--results", str(results), "--page", str(page)]
    assert breakdown.main([*files, "--check"]) == 0, "there is nothing to compare with yet"
    sizes = ["--size", "tiny", "--batch", "1", "--seconds", "1", "--training-seconds", "1", "--calls", "1"]
    assert breakdown.main([*files, *sizes]) == 0
    (found,) = json.loads(results.read_text()).values()
    for of in found["passes"].values():
        assert set(of["fastasr"]) == set(of["upstream"]) == {*breakdown.PARTS, breakdown.PYTHON}
        assert of["fastasr"][breakdown.PRODUCTS] > 0
    text = page.read_text()
    assert f"| {breakdown.PRODUCTS} | " in text
    assert "the products alone take" in text
    assert breakdown.main([*files, "--check"]) == 0
    page.write_text(text.replace("100%", "99%"))
    assert breakdown.main([*files, "--check"]) == 1
    assert breakdown.main([*files, "--page-only"]) == 0
    assert page.read_text() == text
    assert breakdown.main(["--results", str(tmp_path / "none"), "--page-only"]) == 2
