# SPDX-License-Identifier: Apache-2.0
"""The study of where the time of a model in int8 goes."""

import pytest

from fastasr.benchmarks.studies import breakdown, int8_shares
from fastasr.ops import _dispatch


@pytest.mark.skipif(bool(_dispatch.native_reason()), reason="the native library is not built")
def test_a_tiny_model(tmp_path):
    pytest.importorskip("zipformer.modules.model", exc_type=ImportError)
    page, results = tmp_path / "page.md", tmp_path / "found.json"
    page.write_text("<!-- shares:start -->\n<!-- shares:end -->\n")
    files = ["--results", str(results), "--page", str(page)]
    assert (
        int8_shares.main([*files, "--size", "tiny", "--seconds", "1", "--calls", "1", "--batches", "1", "2"])
        == 0
    )
    assert page.read_text().count(f"| {breakdown.PRODUCTS} | ") == 2
    assert "Zipformer tiny, 2 x 1 s" in page.read_text()
    assert "With products at 4 times float32's best rate here" in page.read_text()
    assert int8_shares.main([*files, "--check"]) == 0
