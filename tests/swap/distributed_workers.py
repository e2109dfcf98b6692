# SPDX-License-Identifier: Apache-2.0
"""The two processes of the distributed tests run this. Each asserts; a failure ends the group."""

import contextlib
import copy
import logging

import torch
import torch.distributed as dist
from steps import close, cotangent, numbers, seeded
from tiny_zipformer import batch, tiny, training_step
from upstream_precision import computing_in

import fastasr
from fastasr.models.fast_conformer import FastConformerEncoder
from fastasr.swap import binding


def run(rank):
    for worker in (ddp, fsdp2, without_padding):
        worker(rank)
        dist.barrier()


def _count(model):
    return sum(binding.bound_forward(module) is not None for module in model.modules())


def _in_fp64(seed):
    """Returns a model and a batch. In fp32 gradients of Whiten, and sums that cancel, lose any number of digits."""
    x, lens = batch(seed)
    return tiny().double(), (x.double(), lens)


def _same(found, expected):
    least = 1e-4 * max(g.abs().max().item() for g in expected.values())
    for name, gradient in expected.items():
        close(found[name], gradient, 1e-9, name, least)


def ddp(rank):
    """Checks that a swap before and after wrapping gives the gradients of unswapped DDP, averaged over the ranks."""
    from torch.nn.parallel import DistributedDataParallel

    model, inputs = _in_fp64(rank)
    gradients = {}
    for when in ("never", "before", "after"):
        candidate = copy.deepcopy(model)
        if when == "before":
            fastasr.accelerate(candidate)
        wrapped = DistributedDataParallel(candidate, find_unused_parameters=True)
        if when == "after":
            fastasr.accelerate(wrapped)
        assert (_count(wrapped) > 0) == (when != "never")
        # One seed for all ranks: the same layers are skipped, the data differ.
        _, found, _ = training_step(wrapped, inputs, seed=3)
        gradients[when] = found
        everywhere = [torch.empty_like(found["module.encoder_embed.out.weight"]) for _ in range(2)]
        dist.all_gather(everywhere, found["module.encoder_embed.out.weight"])
        assert torch.equal(*everywhere)
    assert gradients["before"].keys() == gradients["never"].keys()
    _same(gradients["before"], gradients["never"])
    for name in gradients["never"]:
        assert torch.equal(gradients["before"][name], gradients["after"][name]), name


def fsdp2(rank):
    """Checks that a swap before and after fully_shard gives the outputs and gradients of unswapped FSDP2."""
    from torch.distributed.fsdp import FSDPModule, fully_shard

    model, inputs = _in_fp64(5)
    model.eval()  # no draws: outputs and gradients compare directly
    results = {}
    for when in ("never", "before", "after"):
        candidate = copy.deepcopy(model)
        scalars = {p for p in candidate.parameters() if p.ndim == 0}  # FSDP2 shards no scalars
        if when == "before":
            fastasr.accelerate(candidate)
        for stack in candidate.encoder.encoders:
            fully_shard(stack, ignored_params=scalars)
        fully_shard(candidate.encoder_embed.out)  # a class that has a rule of its own
        fully_shard(candidate, ignored_params=scalars)
        assert isinstance(candidate, FSDPModule)
        if when == "after":
            report = fastasr.accelerate(candidate)
            assert "pre-hook" in report["encoder_embed.out"].reason
        assert (_count(candidate) > 40) == (when != "never")
        seeded(0)
        with computing_in(torch.float64):
            out, _ = candidate(*inputs)
            out.backward(cotangent(out))
        gradients = {n: _full(p.grad) for n, p in candidate.named_parameters() if p.grad is not None}
        results[when] = out.detach(), gradients
        assert fastasr.verify(candidate, inputs).ok
        seeded(0)
        with computing_in(torch.float64), torch.no_grad():
            close(candidate(*inputs)[0], out)
        assert fastasr.verify(candidate, inputs).ok  # whatever is unsharded since that run
        assert fastasr.restore(candidate) > 0 or when == "never"
    for when in ("before", "after"):
        close(results[when][0], results["never"][0])
        assert results[when][1].keys() == results["never"][1].keys()
        _same(results[when][1], results["never"][1])


def without_padding(rank):
    """Checks that encoders whose layers FSDP2 wraps run on the frames that exist, with the gradients of DDP, and that a
    Zipformer whose stacks it wraps runs on the padded batch."""
    frames = torch.randn(3, 60, 32, generator=numbers(rank)).double()
    lengths = torch.tensor([60, 31, 2])
    valid = torch.arange(60) < lengths[:, None]
    zipformer, parakeet = tiny().encoder, FastConformerEncoder(32, 48, 2, 4, 64, channels=8)
    fastasr.accelerate(zipformer, ragged=True)
    parakeet.ragged = True
    of_zipformer = frames.transpose(0, 1), lengths, ~valid
    layers = [layer for stack in zipformer.encoders for layer in getattr(stack, "encoder", stack).layers]
    assert _logged_with_fsdp2(zipformer, of_zipformer, layers) == []
    assert _logged_with_fsdp2(parakeet, (frames, valid), list(parakeet.layers)) == []
    (warning,) = _logged_with_fsdp2(zipformer, of_zipformer, list(zipformer.encoders))
    assert "encoders.0 has a hook, but packed frames do not call it" in warning


@contextlib.contextmanager
def _logged():
    """Yields a list, to which what fastasr logs in the block is added."""
    said, handler = [], logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("fastasr").addHandler(handler)
    try:
        yield said
    finally:
        logging.getLogger("fastasr").removeHandler(handler)


def _logged_with_fsdp2(encoder, inputs, parts):
    """Returns what fastasr logs in a call of the encoder whose ``parts`` FSDP2 wraps. Without any it compares results
    with those of the encoder alone."""
    from torch.distributed.fsdp import fully_shard

    encoder.double().eval()
    names = {module: name for name, module in encoder.named_modules()}
    results = []
    for wrapped in (False, True):
        candidate = copy.deepcopy(encoder)
        scalars = {p for p in candidate.parameters() if p.ndim == 0}  # FSDP2 shards no scalars
        for part in (*parts, encoder) if wrapped else ():
            fully_shard(candidate.get_submodule(names[part]), ignored_params=scalars)
        seeded(0)  # Whiten draws in eval mode too
        with _logged() as said:
            y = candidate(*inputs)[0]
        y.backward(cotangent(y))
        results.append((y.detach(), {n: p for n, p in candidate.named_parameters() if p.grad is not None}))
    (y, alone), (of_shards, sharded) = results
    if not said:
        close(of_shards, y)
        for p in alone.values():
            if p.ndim:
                dist.all_reduce(p.grad)
                p.grad /= dist.get_world_size()
        _same({n: _full(p.grad) for n, p in sharded.items()}, {n: p.grad for n, p in alone.items()})
    return said


def _full(gradient):
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
