# SPDX-License-Identifier: Apache-2.0
"""Models whose norms lack parameters or statistics compute after a swap what they computed before."""

import copy

import torch
from steps import close, seeded, swapped

import fastasr


def _without(*names):
    """Returns a change of a norm that takes these parameters or buffers away."""

    def change(norm):
        for name in names:
            setattr(norm, name, None)

    return change


def _never_tracked(norm):
    norm.track_running_stats, norm.num_batches_tracked = False, None
    _without("running_mean", "running_var")(norm)


NORMS = torch.nn.LayerNorm, torch.nn.BatchNorm1d, torch.nn.GroupNorm
AFFINE = {"no bias": _without("bias"), "no parameters": _without("weight", "bias")}
STATISTICS = {"no statistics": _without("running_mean", "running_var"), "never tracked": _never_tracked}
CHANGES = AFFINE | STATISTICS


def changed(model, change):
    """Returns a copy of the model with such norms, or None if it has none that can be so."""
    model, found = copy.deepcopy(model), False
    for norm in model.modules():
        if isinstance(norm, NORMS) and (change in AFFINE or isinstance(norm, torch.nn.BatchNorm1d)):
            found = True
            CHANGES[change](norm)
    return model if found else None


def check(model, run, change, tolerance=2e-5):
    """Asserts it in eval mode and in training."""
    theirs = changed(model, change)
    if theirs is None:
        return
    ours = swapped(theirs)
    for training in (False, True):
        results = []
        for net in (ours, theirs):
            seeded("norms")
            with fastasr.upstream_draws():
                results.append(run(net.train(training)))
        found, expected = results
        close(found, expected, tolerance, f"training: {training}")
    for (name, a), b in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        # ESPnet's rotary positions begin as memory that nothing has written.
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True, msg=name)
