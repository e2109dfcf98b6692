# SPDX-License-Identifier: Apache-2.0
"""Models of every framework whose norms lack parameters or statistics."""

import bare_norms
import families
import pytest
import torch

# upstream's encoder reads the dtype of the weight of its first norm
IMPOSSIBLE = {("fun-asr-nano", "no parameters")}
CASES = [(name, change) for name in families.FAMILIES for change in bare_norms.CHANGES]


@pytest.mark.parametrize(("name", "change"), [case for case in CASES if case not in IMPOSSIBLE])
def test_bare_norms(name, change):
    model, run = families.make(name)
    bare_norms.check(model, lambda net: torch.cat([t.flatten() for t in run(net)]), change)
