# SPDX-License-Identifier: Apache-2.0
"""Measures where the time of a whole Zipformer goes, in inference and in a training step: upstream's and swapped.

    python -m fastasr.benchmarks.studies.breakdown              # measures; JSON beside the rows, and the page
    python -m fastasr.benchmarks.studies.breakdown --page-only  # the page from the JSON; --check compares it

torch's profiler gives the time of every operator, the shortest of several calls; for that, layers call their
submodules one by one. What the call takes beyond its operators' own time, without the profiler, is Python and dispatch.
"""

import contextlib
import sys

from fastasr.benchmarks import upstream
from fastasr.benchmarks.environment import device_name, stamp
from fastasr.benchmarks.harness import Variant
from fastasr.benchmarks.markdown import grid
from fastasr.benchmarks.models.unit import (
    FASTASR,
    UPSTREAM,
    inference,
    product_flops,
    swapped,
    timed_with_products,
)
from fastasr.benchmarks.models.zipformer_training import training_step
from fastasr.benchmarks.studies import results

PRODUCTS, ATTENTION, COPIES = "products of linear layers", "attention", "copies"
PARTS = {  # An operator belongs to the first part that matches its name.
    PRODUCTS: "::gemm reduced_linear aten::addmm aten::mm linear",
    ATTENTION: "attention weighted_values aten::bmm aten::baddbmm softmax",
    "convolutions": "conv",
    "activations, norms, sums": "swoosh norm bypass balancer dropout bernoulli sigmoid tanh aten::add aten::mul "
    "aten::sub aten::div aten::sum aten::mean aten::exp aten::log aten::rand aten::where aten::masked_fill aten::clamp "
    "aten::sqrt aten::pow aten::neg aten::gt aten::lt aten::ge aten::le aten::abs aten::rsqrt aten::square",
    COPIES: "aten::copy_ aten::cat aten::clone aten::fill aten::constant_pad aten::index aten::zero aten::gather "
    "aten::stack",
}
OTHER = "views, allocation, dispatch"
PYTHON = "Python, views, allocation, dispatch"


def part_of(name, shapes):
    """Returns the part of an operator. The product of nonlin_attention is a gemm whose left factor is square."""
    square = name.endswith("::gemm") and len(shapes[0]) == 2 and shapes[0][0] == shapes[0][1]
    if square:
        return ATTENTION
    return next((part for part, keys in PARTS.items() if any(key in name for key in keys.split())), OTHER)


@contextlib.contextmanager
def operators_apart(model):
    """Gives a norm of each layer a hook that does nothing: a hooked layer is not one native call."""
    norms = [module for name, module in model.named_modules() if name.endswith(".norm")]
    hooks = [norm.register_forward_hook(lambda *call: None) for norm in norms]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def profiled(model, call, calls):
    """Returns part -> the milliseconds of its operators, each the shortest of ``calls`` calls."""
    with operators_apart(model):
        return _profiled(call, calls)


def _profiled(call, calls):
    from torch.profiler import ProfilerActivity, profile

    shortest = {}
    call(), call()
    for _ in range(calls):
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as run:
            call()
        for event in run.key_averages(group_by_input_shape=True):
            key = event.key, str(event.input_shapes)
            known = shortest.get(key, (float("inf"),))[0]
            shortest[key] = min(known, event.self_cpu_time_total), part_of(event.key, event.input_shapes)
    parts = dict.fromkeys((*PARTS, OTHER), 0.0)
    for spent, part in shortest.values():
        parts[part] += spent / 1e3
    return {part: round(spent, 3) for part, spent in parts.items()}


def breakdown(model, call, calls, flops):
    """Returns part -> milliseconds, whose sum is the shortest of ``calls`` calls without the profiler; also the
    share of a call's time that products of ``flops`` operations take, and their rate in words.
    """
    parts = profiled(model, call, calls)
    del parts[OTHER]
    timings, shares, rate = timed_with_products(
        {"call": Variant(call)}, flops, reps=calls, warmup=2, sample_seconds=0.0
    )
    rest = 1e3 * min(timings["call"].samples) - sum(parts.values())
    return parts | {PYTHON: round(max(0.0, rest), 3)}, shares["call"], rate


def measure(size="medium", batch=4, seconds=16, training_seconds=8, calls=5, report=lambda _: None):
    """Returns a dict of the parts of each implementation in inference and in a training step."""
    found = {}
    for pass_, length in (("inference", seconds), ("training step", training_seconds)):
        inputs = upstream.example(batch, 100 * length)
        shipped = upstream.zipformer(size, inner_compile=False).train(pass_ != "inference")
        for name, model in ((UPSTREAM, shipped), (FASTASR, swapped(shipped))):
            call = inference(model, *inputs) if pass_ == "inference" else training_step(model, inputs)
            if name == UPSTREAM:
                found[pass_], flops = {"shape": f"{batch} x {length} s"}, product_flops(call)
            parts, share, rate = breakdown(model, call, calls, flops)
            total = sum(parts.values())
            found[pass_][name] = parts
            if name == FASTASR:
                found[pass_] |= {"limit_ms": round(share * total, 3), "limit": rate}
            report(f"{pass_}, {name}: {total:.1f} ms, products {share:.1%} of it at {rate}")
    return {"size": size, "calls": calls, "passes": found, "environment": stamp()}


def block(found):
    """Returns the tables of all machines."""
    return "\n\n".join(map(_of_machine, found.values()))


def _of_machine(found):
    passes = found["passes"]
    heads = [f"{pass_}: {name}, ms" for pass_ in passes for name in ("upstream", "fastasr")]
    heads = [head for pair in zip(heads[::2], heads[1::2], strict=True) for head in (*pair, "share")]
    totals = {
        pass_: {name: sum(of[name].values()) for name in ("upstream", "fastasr")}
        for pass_, of in passes.items()
    }

    def line(label, values):
        cells = []
        for pass_, (theirs, ours) in values.items():
            cells += [f"{theirs:.1f}", f"{ours:.1f}", f"{ours / totals[pass_]['fastasr']:.0%}"]
        return [label, *cells]

    lines = [
        line(part, {pass_: (of["upstream"][part], of["fastasr"][part]) for pass_, of in passes.items()})
        for part in (*PARTS, PYTHON)
    ]
    lines.append(line("**all**", {pass_: tuple(total.values()) for pass_, total in totals.items()}))
    place = found["environment"]
    limits = "; ".join(
        f"{pass_} of {of['shape']}: the products alone take {of['limit_ms']:.0f} ms at the rate of a large product "
        f"({of['limit']}), {of['limit_ms'] / totals[pass_]['fastasr']:.0%} of fastasr's time"
        for pass_, of in passes.items()
    )
    where = f"{place['device_name']}, {place['threads']} thread(s), torch {place['torch']}, commit {place['commit']}"
    lines = grid((f"Zipformer {found['size']}", *heads), lines, len(heads))
    return "\n".join([*lines, "", f"{limits[0].upper()}{limits[1:]}. {where}, {place['date'][:10]}."])


def main(arguments=None):
    """Returns the exit code, see ``results.run``."""
    parser = results.parser("breakdown", __doc__, "benchmarks.md")
    parser.add_argument("--size", choices=sorted(upstream.SIZES), default="medium")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seconds", type=int, default=16, help="of each recording in inference")
    parser.add_argument("--training-seconds", type=int, default=8, help="of each recording in training")
    parser.add_argument("--calls", type=int, default=5)
    options = parser.parse_args(arguments)

    def measured(found):
        sizes = options.size, options.batch, options.seconds, options.training_seconds, options.calls
        return found | {device_name(): measure(*sizes, report=lambda line: print(line, flush=True))}

    return results.run(options, measured, lambda found: {"breakdown": block(found)})


if __name__ == "__main__":
    sys.exit(main())
