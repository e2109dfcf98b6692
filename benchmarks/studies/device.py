# SPDX-License-Identifier: Apache-2.0
"""``python -m fastasr.benchmarks.studies.device --out DIR``: every check and benchmark that needs a GPU, in one
command.

It needs a checkout (for the tests) with fastasr installed from it, and no network. ``--skip`` leaves out any of these
steps:

    environment  versions, the GPU, which kernel serves which op            -> DIR/environment.json
    tests        the op contract on the GPU, the kernels' own tests         -> DIR/*.xml (JUnit), DIR/*.log
    sanitizer    compute-sanitizer memcheck and racecheck on small shapes   -> DIR/sanitizer-*.log
    benchmarks   every op at training sizes, float32 and bfloat16           -> DIR/device.jsonl

Exit code: 0 when every step passed, 1 when one failed, 2 without a usable GPU or checkout.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import torch

from fastasr.benchmarks import limits, rows
from fastasr.benchmarks import ops as op_cases
from fastasr.benchmarks.case import Case, Settings, Unavailable, row, variant
from fastasr.benchmarks.environment import stamp
from fastasr.benchmarks.harness import Variant, peak_bytes, synchronize
from fastasr.benchmarks.rows import Row

STEPS = ("environment", "tests", "sanitizer", "benchmarks")
ROOT = Path(__file__).resolve().parents[2]
TARGET = 0.85  # share of the card's copy bandwidth, for the ops that are bound by memory


def training_cases() -> list[Case]:
    """Returns the sizes of training on a GPU that the ops' modules give."""
    return [case for module in op_cases.MODULES for case in getattr(module, "ON_DEVICE", ())]


class Timer:
    """Times one call on the device alone, with cold caches, as in training where other layers ran in between.

    It overwrites a buffer larger than the L2 cache before each call. Meanwhile the host queues the call, so the events
    around it measure the device, not Python. On a CPU it measures wall-clock time.
    """

    def __init__(self, device: str):
        self.device = device
        self.on_gpu = torch.device(device).type == "cuda"
        self.flushed = torch.empty(2**28 if self.on_gpu else 1, dtype=torch.int32, device=device)

    def milliseconds(self, variant: Variant, calls: int) -> float:
        """Returns the median over ``calls`` calls."""
        states = (() if variant.prepare is None else (variant.prepare(),) for _ in range(calls))
        if not self.on_gpu:
            times = []
            for state in states:
                start = time.perf_counter()
                variant.run(*state)
                times.append((time.perf_counter() - start) * 1e3)
            return statistics.median(times)
        pairs = []
        for state in states:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.flushed.zero_()
            start.record()
            variant.run(*state)
            end.record()
            pairs.append((start, end))
        synchronize(self.device)
        return statistics.median(start.elapsed_time(end) for start, end in pairs)


def _variants(
    case: Case, device: str, dtype: torch.dtype, pass_: str, settings: Settings
) -> Mapping[str, Variant]:
    """Returns what runs in this pass, each called once; an implementation that cannot run is left out
    with a message.
    """
    variants = {}
    for name, build in case.make(device, dtype).items():
        if name == "upstream" or (name == "compile" and not settings.compile):
            continue
        try:
            variants[name] = variant(build(), pass_)
            variants[name].call()
        except Unavailable as reason:
            print(f"# {case.op} {case.name}, {pass_}: {name} left out: {reason}", flush=True)
            variants.pop(name, None)
        except Exception as error:
            if name == "fastasr":
                raise
            print(f"# {case.op} {case.name}, {pass_}: {name} failed: {error!r:.200}", flush=True)
            variants.pop(name, None)
    source, destination = limits.copy_buffers(case.costs(dtype.itemsize)[pass_].bytes, device)
    variants["copy"] = Variant(lambda: destination.copy_(source))
    return variants


def measure(
    case: Case, device: str, dtype: torch.dtype, settings: Settings, timer: Timer
) -> Iterator[list[Row]]:
    """Yields the rows of each pass; ``fraction_of_limit`` is the time of a copy of the same bytes over the median."""
    for pass_ in case.passes:
        torch._dynamo.reset()
        torch.manual_seed(0)
        cost = case.costs(dtype.itemsize)[pass_]
        variants = _variants(case, device, dtype, pass_, settings)
        for made in variants.values():
            timer.milliseconds(made, settings.warmup)
        samples: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(settings.reps):
            for name, made in variants.items():
                samples[name].append(timer.milliseconds(made, 5))
        copy = statistics.median(samples["copy"])
        limit_ms, limit = copy, f"copy {cost.bytes / copy / 1e6:.0f} GB/s"
        if cost.flops:
            rate = limits.gemm_flops_per_second(device, dtype)
            if cost.flops / rate * 1e3 > copy:
                limit_ms, limit = cost.flops / rate * 1e3, f"GEMM {rate / 1e12:.0f} TFLOP/s"
        measured = []
        for name, times in samples.items():
            quartiles = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
            memory = peak_bytes(variants[name], device) if settings.memory and name != "copy" else None
            more = {"reps": len(times), "peak_bytes": memory, "limit": limit}
            measured.append(row(case, device, dtype, pass_, name, quartiles, limit_ms, **more))
        yield measured


def environment(out: Path, quick: bool) -> bool:
    """Describes the machine and the installation."""
    from fastasr.ops import _dispatch

    properties = torch.cuda.get_device_properties(0)
    smi = shutil.which("nvidia-smi")
    report = {
        **stamp("cuda"),
        "capability": torch.cuda.get_device_capability(0),
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "native": _dispatch.native_build_info(),
        "native_reason": _dispatch.native_reason(),
        "ops": _dispatch.table(),
        "nvidia_smi": subprocess.run([smi], capture_output=True, text=True).stdout if smi else "not found",
    }
    (out / "environment.json").write_text(json.dumps(report, indent=1, default=str))
    missing = [r for r in report["ops"] if r["backend"] == "triton" and not r["available"]]
    for op in missing:
        print(f"# {op['op']}: no Triton kernel: {op['reason']}")
    return not missing


def _logged(command: list[str], log: Path, **variables: str) -> int:
    """Runs from the checkout with output to ``log`` and prints the last line. Returns the exit code."""
    with log.open("w") as file:
        code = subprocess.run(
            command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | variables, cwd=ROOT
        ).returncode
    lines = log.read_text(errors="replace").strip().splitlines() or [""]
    print(f"# exit {code}: {log.name}: {lines[-1]}", flush=True)
    return code


def tests(out: Path, quick: bool) -> bool:
    """Runs the device suite: the op contract on CUDA tensors, and the kernels' and models' tests, those marked gpu
    included.
    """
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    runs = {
        "contract": ["tests/ops/test_contract.py", "-k", "cuda" + (" and swoosh_l" if quick else "")],
        "kernels": ["tests/kernels", *(["-m", "gpu"] if quick else [])],
        "models": ["tests/models", "-m", "gpu"],
    }
    codes = [
        _logged([*pytest, *arguments, f"--junitxml={out / name}.xml"], out / f"{name}.log")
        for name, arguments in runs.items()
    ]
    return not any(codes)


def launch_everything() -> None:
    """Launches every kernel once on shapes with and without tails; compute-sanitizer watches this program."""
    from fastasr import ops

    for dtype in (torch.float32, torch.bfloat16):
        make = partial(torch.randn, device="cuda", dtype=dtype)
        for shape in ((7, 3, 40), (65, 2, 192), (33, 1, 513)):
            x, other = make(shape).requires_grad_(), make(shape).requires_grad_()
            channels = make(shape[-1]).requires_grad_()
            weight = make(24, shape[-1]).requires_grad_()
            outputs = [ops.swoosh_l(x), ops.swoosh_r(x)]
            for shared in (None, 0, 1, 2):
                options = {"dropout_p": 0.2, "dropout_shared_dim": shared, "training": True}
                outputs.append(ops.swoosh_linear(x, weight, **options))
            outputs += [ops.bias_norm(x, channels, make(()).requires_grad_()), ops.bypass(other, x, channels)]
            outputs.append(ops.bypass(other, x, make(shape[1:]).requires_grad_()))
            for y in outputs:
                y.sum().backward()
    launch_ema_scan()
    launch_spatial_gate()
    launch_lstm()
    launch_attention()
    launch_relative_attention()
    launch_segment_attention()
    launch_rel_attention()
    launch_lattices()
    torch.cuda.synchronize()


def launch_spatial_gate() -> None:
    """Launches with tails of frames and of channels, a mask, and every activation."""
    from fastasr import ops

    for dtype in (torch.float32, torch.bfloat16):
        make = partial(torch.randn, device="cuda", dtype=dtype)
        for batch, frames, channels, taps in ((3, 1, 40, 7), (2, 67, 130, 31)):
            mask = torch.arange(frames, device="cuda").expand(batch, frames) >= frames - 1
            for activation in ("identity", "silu", "relu", "tanh", "gelu"):
                shapes = (
                    (batch, frames, 2 * channels),
                    (channels,),
                    (channels,),
                    (channels, taps),
                    (channels,),
                )
                tensors = [make(shape).requires_grad_() for shape in shapes]
                y = ops.conv_spatial_gate(*tensors, padding_mask=mask, activation=activation)
                y.sum().backward()


def launch_lstm() -> None:
    """Launches several steps in one launch and one step in two, tails of units and of sequences, with and without a
    state.
    """
    from fastasr import ops

    for dtype in (torch.float32, torch.bfloat16):
        make = partial(torch.randn, device="cuda", dtype=dtype)
        for steps, batch, units in ((5, 3, 70), (3, 37, 19), (1, 2, 130)):
            shapes = (
                (steps, batch, 33),
                (4 * units, 33),
                (4 * units, units),
                *((4 * units,),) * 2,
                *((units,),) * 2,
            )
            for state in ((), ((batch, units),) * 2):
                tensors = [make(shape).requires_grad_() for shape in (*shapes, *state)]
                sum(t.sum() for t in ops.layer_norm_lstm(*tensors)).backward()


def launch_lattices() -> None:
    """Launches more columns than a block holds, ragged boundaries, and bands that move."""
    from fastasr import ops

    make = partial(torch.randn, device="cuda")
    for modified in (False, True):
        x, y = make(2, 5, 1500 + (not modified)).requires_grad_(), make(2, 6, 1500).requires_grad_()
        boundary = torch.tensor([[0, 0, 5, 1500], [1, 3, 4, 90]], device="cuda")
        ops.rnnt_lattice(x, y, boundary).sum().backward()
        x, y = make(3, 70, 5).requires_grad_(), make(3, 70, 5).requires_grad_()
        starts = (torch.arange(70, device="cuda") // 3).expand(3, 70)
        ops.rnnt_pruned_lattice(x, y, starts, modified=modified).sum().backward()


def launch_attention() -> None:
    """Launches tiles with tails in every direction, masks, chunks, one block of channels and several."""
    from fastasr import ops

    for dtype in (torch.float32, torch.bfloat16):
        make = partial(torch.randn, device="cuda", dtype=dtype)
        for length, batch, d, v in ((1, 2, 8, 12), (150, 2, 20, 40), (70, 1, 150, 140)):
            padding = torch.rand(batch, length, device="cuda") > 0.8
            padding[:, 0] = False
            keep = torch.rand(batch, 1, length, length, device="cuda") > 0.2
            for options in (
                {},
                {"padding_mask": padding, "weights_dropout": keep, "causal": False},
                {"chunk_size": 40, "activate_value": True, "activation": "gelu"},
            ):
                shapes = (
                    (length, batch, d),
                    (length, batch, v),
                    (length, batch, v),
                    (2, d),
                    (2, d),
                    (2 * length - 1,),
                )
                tensors = [make(shape).requires_grad_() for shape in shapes]
                ops.toeplitz_attention(*tensors, **options).sum().backward()


def launch_relative_attention() -> None:
    """Launches both forms of the forward pass, packed and other positions, caches, masks, chunks, the penalty."""
    from fastasr import ops

    for dtype in (torch.float32, torch.bfloat16):
        make = partial(torch.randn, device="cuda", dtype=dtype)
        for frames, left, dim, pos_dim in ((1, 0, 8, 4), (70, 9, 20, 3), (600, 0, 32, 4)):
            keys = left + frames
            x, pos = make(frames, 2, 3 * (2 * dim + pos_dim)) / 4, make(1, keys + frames - 1, 3 * pos_dim) / 4
            options = {"cached_key": make(left, 2, 3 * dim) / 4} if left else {}
            padding = torch.arange(keys, device="cuda") >= torch.tensor([[keys], [keys // 2]], device="cuda")
            mask = torch.rand(2, frames, keys, device="cuda") > 0.9
            for masks in (
                {},
                {"key_padding_mask": padding, "attn_mask": mask, "score_penalty": 1e-3, "score_limit": 1.0},
                {"chunk_size": 16, "left_context_chunks": 1, "key_padding_mask": padding},
            ):
                leaves = [t.detach().requires_grad_() for t in (x, pos)]
                ops.zipformer_attention_weights(*leaves, 3, dim, **options, **masks).sum().backward()
                value = make(keys, 2, 2 * 20).requires_grad_()
                masks = {name: mask for name, mask in masks.items() if "score" not in name}
                y = ops.zipformer_attention(*leaves, value, 3, dim, value_heads=2, **options, **masks)
                y.sum().backward()


def launch_segment_attention() -> None:
    """Launches several segments per block and several blocks per segment, every mask, a step of a stream, blocks of
    channels.
    """
    from fastasr import ops
    from fastasr.ops.segment_attention import rows_of

    names = ("frames", "segment_length", "left_context_length", "right_context_length", "max_memory_size")
    for dtype in (torch.float32, torch.bfloat16):
        make = partial(torch.randn, device="cuda", dtype=dtype)
        for width, past, sizes in (
            (64, (0, 0), (75, 16, 30, 4, 0)),
            (20, (0, 0), (33, 4, 9, 1, 3)),
            (150, (0, 0), (90, 70, 9, 3, 1)),
            (64, (30, 4), (16, 16, 30, 4, 4)),
        ):
            frames, segment, left, right, memory = sizes
            queries, keys = rows_of(frames, segment, right, memory, *past)
            masks = {"lengths": torch.tensor([frames, frames // 2], device="cuda")}
            masks["weights_dropout"] = (
                torch.rand(2, 2, queries, memory + right + left + segment, device="cuda") > 0.2
            )
            if past[0]:
                masks["history"] = torch.tensor([20, 2], device="cuda")
            for more in ({}, masks):
                tensors = [make(rows, 2, 2 * width).requires_grad_() for rows in (queries, keys, keys)]
                options = dict(zip(names, sizes, strict=True)) | {
                    "past_frames": past[0],
                    "past_memory": past[1],
                }
                ops.segment_attention(*tensors, num_heads=2, **options, **more).sum().backward()


def launch_rel_attention() -> None:
    """Launches tiles with tails, tiles twice as high as wide, square ones, and several blocks of channels."""
    from fastasr import ops

    for dtype in (torch.float32, torch.bfloat16):
        make = partial(torch.randn, device="cuda", dtype=dtype)
        for frames, dim, value_dim in ((1, 8, 12), (70, 64, 64), (45, 144, 20)):
            rows = [(2, frames, 3, width) for width in (dim, dim, value_dim)]
            shapes = *rows, (2 * frames - 1, 3, dim), (3, dim), (3, dim)
            padding = torch.arange(frames, device="cuda") >= torch.tensor(
                [[frames], [frames // 2]], device="cuda"
            )
            mask = torch.rand(2, frames, frames, device="cuda") > 0.7
            for masks in (
                {},
                {"key_padding_mask": padding},
                {"key_padding_mask": padding, "attn_mask": mask},
            ):
                tensors = [make(shape).requires_grad_() for shape in shapes]
                ops.rel_attention(*tensors, **masks).sum().backward()


def launch_ema_scan() -> None:
    """Launches every path of the CUDA kernels: layouts, storage types, groups of states, one segment and several, one
    step.
    """
    from fastasr import ops

    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        make = partial(torch.randn, device="cuda", dtype=dtype)
        for length, batch, channels, states in (
            (1, 3, 40, 4),
            (70, 2, 33, 5),
            (700, 1, 40, 4),
            (300, 130, 8, 1),
        ):
            mask = torch.rand(batch, length, device="cuda") > 0.8
            state = make(batch, channels, states)
            for options in (
                {"activation": "silu", "state": state, "return_state": True},
                {"direction": "reverse", "layout": "BLD", "padding_mask": mask, "activation": "gelu"},
                {"direction": "bidirectional", "layout": "BDL", "padding_mask": mask, "activation": "tanh"},
                {"truncation": 20, "layout": "BDL", "activation": "relu"},
            ):
                rows = channels * (2 if options.get("direction") == "bidirectional" else 1)
                sizes = {"L": length, "B": batch, "D": channels}
                x = make(*(sizes[letter] for letter in options.get("layout", "LBD"))).requires_grad_()
                parameters = [make(rows, states).requires_grad_() for _ in range(4)]
                omega = make(channels).requires_grad_()
                outputs = [ops.ema_scan(x, *parameters, omega, **options)]
                parameters[2:] = [make(rows).requires_grad_(), make(rows, states, 2).requires_grad_()]
                if "state" in options:
                    options["state"] = make(batch, channels, states, 2)
                outputs.append(ops.complex_ema_scan(x, *parameters, omega, **options))
                flat = [t for y in outputs for t in (y if isinstance(y, tuple) else (y,))]
                sum(t.float().sum() for t in flat).backward()


def sanitizer(out: Path, quick: bool) -> bool:
    """Runs memcheck and racecheck; passes with a message where compute-sanitizer is not installed."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    found = [
        shutil.which("compute-sanitizer"),
        *(Path(home) / "bin" / "compute-sanitizer" for home in homes if home),
    ]
    program = next((str(path) for path in found if path and Path(path).exists()), None)
    if program is None:
        print("# compute-sanitizer is not installed: memcheck and racecheck were not run", flush=True)
        return True
    target = "from fastasr.benchmarks.studies.device import launch_everything; launch_everything()"
    # Without torch's caching allocator each tensor's end is the end of an allocation.
    variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    codes = []
    for tool in ("memcheck",) if quick else ("memcheck", "racecheck"):
        command = [program, f"--tool={tool}", "--error-exitcode=3", sys.executable, "-c", target]
        codes.append(_logged(command, out / f"sanitizer-{tool}.log", **variables))
    return not any(codes)


def benchmarks(out: Path, quick: bool) -> bool:
    """Measures every case; passes unless one fails. Below-target rows are printed, not failures."""
    file, timer = out / "device.jsonl", Timer("cuda")
    settings = Settings.quick(compile=False) if quick else Settings(reps=25)
    failed = False
    for case in training_cases()[:: 6 if quick else 1]:
        for dtype in (torch.float32, torch.bfloat16):
            try:
                for unit in measure(case, "cuda", dtype, settings, timer):
                    rows.merge(file, unit)
                    _print(unit)
            except Exception as error:  # one case must not end the run
                failed = True
                print(f"# {case.op} {case.name} {dtype}: failed: {error!r:.300}", flush=True)
            torch.cuda.empty_cache()
    return not failed


def _print(unit: list[Row]) -> None:
    first = unit[0]
    times = "  ".join(f"{row.implementation} {row.median_ms * 1e3:.1f} us" for row in unit)
    ours = next((row for row in unit if row.implementation == "fastasr"), None)
    fraction = f"  {ours.fraction_of_limit:.0%} of {ours.limit}" if ours else ""
    low = "  BELOW TARGET" if ours and not ours.flops and ours.fraction_of_limit < TARGET else ""
    print(f"{first.name} {first.case} {first.dtype} {first.pass_}: {times}{fraction}{low}", flush=True)


def obstacle() -> str:
    """Says why nothing can run here; "" when everything can."""
    if not torch.cuda.is_available():
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU only"
        return f"no GPU: torch {torch.__version__}, built for {built}, sees no CUDA device"
    if torch.cuda.get_device_capability(0) < (8, 0):
        return f"{torch.cuda.get_device_name(0)} is older than compute capability 8.0"
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton does not import ({error})"
    return ""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fastasr.benchmarks.studies.device",
        description="All checks and benchmarks that need a GPU; writes reports and rows to a folder.",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for reports and rows")
    parser.add_argument("--skip", nargs="*", choices=STEPS, default=[], help="steps to leave out")
    parser.add_argument("--quick", action="store_true", help="a few cases; shows that everything runs")
    options = parser.parse_args(arguments)
    reason = obstacle()
    if not reason and "tests" not in options.skip and not (ROOT / "tests" / "ops").is_dir():
        reason = f"no tests beside {ROOT}: use a checkout, installed with pip install -e, or --skip tests"
    if reason:
        print(f"fastasr.benchmarks.studies.device: {reason}", file=sys.stderr)
        return 2
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    results = {}
    for step in STEPS:
        if step in options.skip:
            continue
        print(f"== {step}", flush=True)
        start = time.monotonic()
        passed = globals()[step](out, options.quick)
        results[step] = {"passed": passed, "seconds": round(time.monotonic() - start, 1)}
        (out / "summary.json").write_text(json.dumps({**stamp("cuda"), "steps": results}, indent=1))
    for step, result in results.items():
        print(f"{step:12} {'passed' if result['passed'] else 'FAILED'}  {result['seconds']:.0f} s")
    return 0 if all(result["passed"] for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
