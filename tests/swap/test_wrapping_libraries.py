# SPDX-License-Identifier: Apache-2.0
"""Libraries that put their own forward or their own modules into a model, before a swap and after it: accelerate's
hooks, offloading and mixed precision, and torch's dynamic quantisation. The swapped model does what upstream's does."""

import copy
import pickle

import families
import pytest
import torch
from families import FAMILIES
from steps import close, seeded, swapped

import fastasr
from fastasr.swap import binding

accelerate = pytest.importorskip("accelerate")


def outputs(model, run):
    seeded("call")
    with torch.no_grad():
        return run(model)


def same(ours, theirs, run):
    close(outputs(ours, run), outputs(theirs, run), 1e-4)


class Doubling(accelerate.hooks.ModelHook):
    def post_forward(self, module, output):
        return 2 * output


@pytest.mark.parametrize("after", [False, True], ids=["before the swap", "after the swap"])
@pytest.mark.parametrize("name", ["parakeet", "emformer", "zipformer", "mega"])
def test_a_hook_of_accelerate_is_honoured(name, after):
    theirs, run = families.make(name)
    path = [path for path, m in theirs.named_modules() if type(m) is torch.nn.Linear][-1]
    ours = copy.deepcopy(theirs)
    if after:
        fastasr.accelerate(ours)
        outputs(ours, run)
    for model in (theirs, ours):
        accelerate.hooks.add_hook_to_module(model.get_submodule(path), Doubling())
    if not after:
        fastasr.accelerate(ours)
    same(ours, theirs, run)
    for model in (theirs, ours):
        accelerate.hooks.remove_hook_from_module(model.get_submodule(path))
    same(ours, theirs, run)


@pytest.mark.parametrize("after", [False, True], ids=["before the swap", "after the swap"])
@pytest.mark.parametrize("name", FAMILIES)
def test_parameters_that_are_offloaded(name, after):
    theirs, run = families.make(name)
    expected = outputs(theirs, run)
    ours = copy.deepcopy(theirs)
    if after:
        fastasr.accelerate(ours)
    try:
        accelerate.cpu_offload(theirs, execution_device="cpu")
        close(outputs(theirs, run), expected, 1e-4)  # openai-whisper's decoder gives zeros
    except (AssertionError, RuntimeError, ValueError, NotImplementedError, KeyError) as error:
        pytest.skip(f"upstream's model cannot be offloaded: {error}")
    accelerate.cpu_offload(ours, execution_device="cpu")
    if not after:
        fastasr.accelerate(ours)
    close(outputs(ours, run), expected, 1e-4)


@pytest.mark.parametrize("keep", [False, True], ids=["taken off", "kept"])
def test_a_wrapper_for_mixed_precision_comes_off(keep):
    theirs, run = families.make("parakeet")
    ours = swapped(theirs)
    bound = binding.bound_forward(ours)
    device = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    model = device.prepare_model(ours)
    expected = outputs(device.prepare_model(copy.deepcopy(theirs)), run)
    for found, one in zip(outputs(model, run), expected, strict=True):
        assert (found - one).norm() < 0.02 * one.norm()
    unwrapped = device.unwrap_model(model, keep_fp32_wrapper=keep)
    assert unwrapped is ours
    if keep:
        return
    assert binding.bound_forward(ours) is bound
    same(ours, theirs, run)
    loaded = pickle.loads(pickle.dumps(ours))
    same(loaded, theirs, run)
    fastasr.restore(ours)
    assert "forward" not in vars(ours)


def pair(name, swapped):
    """Returns upstream's model, a copy, which has been swapped and called if so asked, and a call of either."""
    theirs, run = families.make(name)
    ours = copy.deepcopy(theirs)
    if swapped:
        fastasr.accelerate(ours)
        outputs(ours, run)
    return theirs, ours, run


@pytest.mark.parametrize("after", [False, True], ids=["before the swap", "after the swap"])
@pytest.mark.parametrize("name", FAMILIES)
def test_dynamic_quantisation(name, after):
    theirs, ours, run = pair(name, after)
    quantised = []
    for model in (theirs, ours):
        kinds = {torch.nn.Linear}
        quantised.append(torch.ao.quantization.quantize_dynamic(model, kinds, dtype=torch.qint8))
    theirs, ours = quantised
    if not after:
        fastasr.accelerate(ours)
    try:
        expected = outputs(theirs, run)
    except Exception as error:
        pytest.skip(f"upstream's model cannot be quantised: {error}")
    for found, one in zip(outputs(ours, run), expected, strict=True):
        assert found.shape == one.shape
        # activations that are nearly halfway between two steps of int8 may round either way
        assert (found - one).norm() <= 0.02 * one.norm()


class OfTorch(torch.Tensor):
    """A weight that knows torch's own functions and no others, as torchao's quantised ones."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if getattr(function, "namespace", "") == "fastasr":
            raise NotImplementedError(f"{cls.__name__} does not know {function}")
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.parametrize("after", [False, True], ids=["before the swap", "after the swap"])
@pytest.mark.parametrize("name", FAMILIES)
def test_weights_of_a_class_with_its_own_functions(name, after):
    theirs, ours, run = pair(name, after)
    for model in (theirs, ours):
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight = torch.nn.Parameter(module.weight.detach().as_subclass(OfTorch))
    if not after:
        fastasr.accelerate(ours)
    try:
        expected = outputs(theirs, run)
    except Exception as error:
        pytest.skip(f"upstream's model does not take such weights: {error}")
    close(outputs(ours, run), expected, 1e-4)
