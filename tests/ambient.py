# SPDX-License-Identifier: Apache-2.0
"""Runs functions in every ambient setting: a default dtype that is narrower and one that is wider, and a default device
on which tensors have no values.

A module's tables, and what functions keep between calls, may be made in any of them.
"""

import contextlib
import copy
import functools
import sys

import torch
from steps import seeded
from torch.utils._pytree import tree_flatten

import fastasr
from fastasr.testing import seeds

NARROW = torch.bfloat16, torch.float16  # of which the run's seed chooses one
SETTINGS = NARROW[seeds.seeded("ambient") % 2], torch.float64, torch.device("meta")
# keep what this machine has and which product is faster
MEASURED = "fastasr.ops._dispatch", "fastasr.ops._gemm"


@contextlib.contextmanager
def ambient(setting):
    before = torch.get_default_dtype()
    try:
        if isinstance(setting, torch.device):
            torch.set_default_device(setting)
        else:
            torch.set_default_dtype(setting)
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(before)


@functools.cache
def _caching(name):
    """Returns the functions of a module that keep results."""
    return [f for f in vars(sys.modules[name]).values() if callable(getattr(f, "cache_clear", None))]


def forget():
    """Empties the caches of fastasr's functions."""
    for name in list(sys.modules):
        if name.startswith("fastasr.") and name not in MEASURED:
            for function in _caching(name):
                function.cache_clear()


def outcome(run):
    """Returns the tensors that ``run()`` returns and, as one more, the numbers."""
    seeded("ambient")
    leaves = tree_flatten(run())[0]
    numbers = [float(leaf) for leaf in leaves if isinstance(leaf, int | float)]
    found = [leaf.detach() for leaf in leaves if isinstance(leaf, torch.Tensor)]
    return [*found, torch.tensor(numbers, dtype=torch.float64, device="cpu")]


def difference(found, expected):
    """Says what differs between two outcomes, or returns ""."""
    if len(found) != len(expected):
        return f"{len(found)} tensors instead of {len(expected)}"
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        kinds = [f"{t.dtype} {tuple(t.shape)} on {t.device}" for t in (one, other)]
        if kinds[0] != kinds[1]:
            return f"tensor {number} is {kinds[0]} instead of {kinds[1]}"
        if one.is_meta:
            return f"tensor {number} has no values"
        differs = (one != other) & ~(one.isnan() & other.isnan())
        if differs.any():
            largest = (one.double() - other.double()).abs().max()
            return (
                f"tensor {number} differs in {int(differs.sum())} of {one.numel()} places, by {largest:.3g}"
            )
    return ""


def same_everywhere(fresh, settings=SETTINGS):
    """Asserts that the function that ``fresh()`` returns gives the same bits in every setting, and then outside of it
    with what it kept.
    """
    forget()
    expected = outcome(fresh())
    for setting in settings:
        forget()
        run = fresh()
        with ambient(setting):
            found = outcome(run)
        assert not (text := difference(found, expected)), f"under {setting}: {text}"
        assert not (text := difference(outcome(run), expected)), f"after {setting}: {text}"
    forget()


def same_model_everywhere(model, run, settings=SETTINGS):
    """Asserts that ``run(model)`` returns the same bits in every setting, first in inference mode and then with
    gradients, and that the parameters' gradients have the same bits.
    """
    same_everywhere(lambda: functools.partial(_step, copy.deepcopy(model), run), settings)


def _step(model, run):
    with torch.inference_mode():
        at_first = run(model)
    found = tree_flatten(run(model))[0]
    leaves = [t for t in found if isinstance(t, torch.Tensor) and t.requires_grad]
    if not leaves:
        return at_first, found
    waves = [torch.arange(t.numel(), dtype=t.dtype, device=t.device).sin_().view(t.shape) for t in leaves]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    grads = torch.autograd.grad(leaves, parameters, waves, allow_unused=True)
    return at_first, found, grads


def same_swapped_everywhere(model, run):
    """Asserts that after a swap a module of every class that is replaced, called as ``run(model)`` calls it first, has
    the same bits in every setting, and the whole ``run(model)`` in every setting in which upstream's code has.
    """
    swapped = copy.deepcopy(model)
    calls = {"": run} | _calls(model, [row.path for row in fastasr.accelerate(swapped).replaced], run)
    seen = set()
    for path, call in calls.items():
        theirs, ours = model.get_submodule(path), swapped.get_submodule(path)
        if type(theirs) in seen:
            continue
        seen.add(type(theirs))
        settings = SETTINGS if path else [s for s in SETTINGS if _is_same(theirs, call, s)]
        try:
            same_model_everywhere(ours, call, settings)
        except Exception as error:
            error.add_note(f"{path}, a {type(theirs).__name__}")
            raise


def _calls(model, paths, run):
    """Returns path -> a function that calls a module with the arguments of its first call in ``run(model)``."""
    found = {}

    def keep(path, module, args, kwargs):
        if path not in found:
            given = copy.deepcopy((args, kwargs))  # what is one tensor stays one: queries are keys

            def call(module):
                args, kwargs = copy.deepcopy(given)
                return module(*args, **kwargs)

            found[path] = call

    watched = copy.deepcopy(model)
    for path in paths:
        watched.get_submodule(path).register_forward_pre_hook(functools.partial(keep, path), with_kwargs=True)
    with torch.no_grad():
        run(watched)
    found.pop("", None)
    return found


def _is_same(module, call, setting):
    used = copy.deepcopy(module)
    try:
        expected = outcome(functools.partial(_step, copy.deepcopy(module), call))
        with ambient(setting):
            return not difference(outcome(functools.partial(_step, used, call)), expected)
    except (NotImplementedError, RuntimeError, TypeError, ValueError):
        return False
