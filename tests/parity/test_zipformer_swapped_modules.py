# SPDX-License-Identifier: Apache-2.0
"""What holds for every swapped module that runs its parts' kernels: states, hooks, parts replaced later, verify."""

import warnings

import pytest
import torch
from tiny_encoders import swapped
from torch.testing import assert_close

pytest.importorskip("zipformer", reason="upstream's package is not installed")

from zipformer.modules.subsampling import Conv2dSubsampling
from zipformer.modules.zipformer import ConvolutionModule

import fastasr


def _convolution(causal=False, masked=True):
    module = ConvolutionModule(12, 7, causal)
    torch.nn.init.normal_(module.out_proj.weight)
    mask = torch.arange(20) >= torch.tensor([[20], [17], [0]])
    return module.eval(), (torch.randn(20, 3, 12), *([mask] if masked else []))


def _front_end():
    module = Conv2dSubsampling(20, 12, 4, 8, 16, dropout=0.5)
    return module.eval(), (torch.randn(2, 45, 20), torch.tensor([45, 36]))


MODULES = {
    "convolution": _convolution,
    "convolution, no mask": lambda: _convolution(masked=False),
    "causal convolution": lambda: _convolution(causal=True),
    "causal convolution, no mask": lambda: _convolution(causal=True, masked=False),
    "front end": _front_end,
}
PARTS = {
    _convolution: ("activation2", "depthwise_conv", "balancer2", "whiten", "out_proj"),
    _front_end: ("conv", "conv.1", "conv.7", "convnext", "convnext.out_balancer"),
}


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_state_dict_verify_and_no_warnings(make):
    upstream, inputs = make()
    ours = swapped(upstream)
    assert list(ours.state_dict()) == list(upstream.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), upstream.parameters(), strict=True))
    ours.load_state_dict(upstream.state_dict(), strict=True)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        ours(*inputs)
    assert fastasr.verify(ours, inputs).ok


@pytest.mark.parametrize(("make", "part"), [(make, part) for make, parts in PARTS.items() for part in parts])
def test_hooks_see_what_upstream_gives_them(make, part):
    upstream, inputs = make()
    seen = []
    ours = swapped(upstream)
    for module in (upstream, ours):
        child = module.get_submodule(part)
        child.register_forward_hook(lambda module, args, y: seen.append((args[0].shape, args[0].stride())))
    with torch.no_grad():
        upstream(*inputs)
        ours(*inputs)
    assert len(seen) == 2
    assert seen[0] == seen[1]


class _Twice(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 2 * self.inner(x)


@pytest.mark.parametrize(("make", "part"), [(_convolution, "depthwise_conv"), (_front_end, "conv")])
def test_convolutions_replaced_after_the_swap(make, part):
    upstream, inputs = make()
    ours = swapped(upstream)
    for module in (upstream, ours):
        setattr(module, part, _Twice(getattr(module, part)))
    with torch.no_grad():
        assert_close(ours(*inputs), upstream(*inputs), rtol=1e-5, atol=3e-6)
