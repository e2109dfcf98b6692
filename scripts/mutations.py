# SPDX-License-Identifier: Apache-2.0
"""Puts faults into a copy of this checkout, one at a time, and says which of them the short tests find.

    python scripts/mutations.py FOLDER [WORD...]

FOLDER is empty or from an earlier call: it gets the copy. With words, only faults whose file or description has one of
them are put in. Each fault is an edit of one file and the part of the short run that concerns it. The run fails if a
part does not find its fault, or if an edit does not fit its file any more. docs/testing.md has the results.
"""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# place in the installed package -> a part of fastasr that lies beside it
PARTS = {"kernels": "fastasr/kernels", "benchmarks": "fastasr/benchmarks"}
CONTRACT = "tests/ops/test_contract.py"
INTERPRETED = {"TRITON_INTERPRET": "1", "FASTASR_TEST_BACKEND": "triton"}
PLUGIN = ("-p", "tests.kernels.interpreter.plugin")


@dataclass(frozen=True)
class Fault:
    """``old`` becomes ``new`` in ``file``. ``tests``: arguments of pytest."""

    file: str
    what: str
    old: str
    new: str
    tests: tuple[str, ...]

    @property
    def interpreted(self) -> bool:
        return self.file.startswith("kernels/")


def interpreted(op: str) -> tuple[str, ...]:
    return *PLUGIN, CONTRACT, "-k", f"test_contract and {op}-parity"


FAULTS = (
    Fault(
        "kernels/_flat.py",
        "the tail is left out where 8 elements remain",
        "(lanes < tail) &",
        "(lanes < tail) & (tail != 8) &",
        interpreted("swoosh_l"),
    ),
    Fault(
        "kernels/_flat.py",
        "offsets have 32 bits",
        "offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)",
        "offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)",
        ("tests/kernels/interpreter/test_swoosh.py",),
    ),
    Fault(
        "kernels/_swoosh.py",
        "a right activation has the offset of a left one",
        "a: tl.constexpr = 1.0 if RIGHT else 4.0",
        "a: tl.constexpr = 4.0",
        interpreted("swoosh_r"),
    ),
    Fault(
        "kernels/residual_norm.py",
        "rows past the end are not masked",
        "keep = (r < rows)[:, None] & (c < C)[None, :]",
        "keep = (r < rows + 1)[:, None] & (c < C)[None, :]",
        interpreted("residual_norm"),
    ),
    Fault(
        "fastasr/ops/_joiner_rows.py",
        "the weight's gradient of a chunk of rows replaces that of the chunks before",
        "add(dweight, d.t(), hidden)",
        "add(dweight.zero_(), d.t(), hidden)",
        (CONTRACT, "-k", "test_contract and joiner-parity"),
    ),
    Fault(
        "fastasr/ops/_dropout.py",
        "a second derivative is not divided by the share that is kept",
        "(keep.view(grad.shape) / (1 - ctx.p))",
        "keep.view(grad.shape)",
        ("tests/ops/test_dropout.py",),
    ),
    Fault(
        "fastasr/models/mega/positional_bias.py",
        "two operands of the rotary bias change places",
        "a2 * b1 - a1 * b2",
        "a1 * b2 - a2 * b1",
        ("tests/models/test_mega.py",),
    ),
    Fault(
        "fastasr/models/zipformer/whitening.py",
        "the two probabilities change places",
        "module.min_prob if verdict.read() else module.max_prob",
        "module.max_prob if verdict.read() else module.min_prob",
        ("tests/parity/test_zipformer_regularisers.py",),
    ),
    Fault(
        "fastasr/ops/whitening_gradient.py",
        "the gradient changes from twice the limit on",
        "metric < a.limit",
        "metric < 2 * a.limit",
        ("tests/parity/test_zipformer_regularisers.py",),
    ),
    Fault(
        "fastasr/swap/engine.py",
        "a module with a forward hook is swapped",
        '("hook", module._forward_hooks)',
        '("hook", {})',
        ("tests/swap/test_matching.py",),
    ),
    Fault(
        "fastasr/swap/rules/zipformer/convolution.py",
        "the padding mode is not compared",
        "conv.padding, conv.padding_mode)",
        'conv.padding, "zeros")',
        ("tests/swap/test_matching.py",),
    ),
    Fault(
        "fastasr/swap/state.py",
        "Python's random state is not restored",
        "        random.setstate(self.python)\n",
        "",
        ("tests/swap/test_verify.py",),
    ),
    Fault(
        "fastasr/swap/verdict.py",
        "a module like an earlier one passes whatever it computes",
        "            if not difference <= limit < math.inf:  # nor is it with NaN\n",
        "            if False:\n",
        ("tests/swap/test_like_modules.py",),
    ),
    Fault(
        "fastasr/swap/interruption.py",
        "Ctrl-C takes effect at once",
        "        if len(pressed) > 1:\n",
        "        if pressed:\n",
        ("tests/swap/test_verify_messages.py",),
    ),
    Fault(
        "fastasr/swap/reach.py",
        "the dicts of a model come back empty",
        "                    base.__setitem__(held, key, value)\n",
        "                    pass\n",
        ("tests/swap/test_verify.py",),
    ),
)


def copied(folder: Path) -> None:
    """Copies the checkout's files, with the native library and with the parts of the package in their places."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    names = [
        *filter(None, listed.stdout.split("\0")),
        *(f"fastasr/{p.name}" for p in ROOT.glob("fastasr/*.so")),
    ]
    for name in filter(lambda name: (ROOT / name).is_file(), names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    for source, target in PARTS.items():
        if not (folder / target).exists():
            (folder / target).symlink_to(folder / source)


def found_by(fault: Fault, folder: Path) -> str:
    """Returns the name of the first test that fails with the fault, or why there is none."""
    path = folder / fault.file
    text = path.read_text(encoding="utf-8")
    if text.count(fault.old) != 1:
        return f"does not fit: {fault.old!r} is there {text.count(fault.old)} times"
    path.write_text(text.replace(fault.old, fault.new), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-m", "not long", *fault.tests]
    # The copy's modules come before the installed package's.
    environment = {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    environment |= INTERPRETED if fault.interpreted else {}
    try:
        done = subprocess.run(
            command, cwd=folder, env=os.environ | environment, capture_output=True, text=True
        )
    finally:
        path.write_text(text, encoding="utf-8")
    failed = re.search(r"^(?:FAILED|ERROR) (.*?)(?: - .*)?$", done.stdout, re.MULTILINE)
    if done.returncode == 1 and failed:
        return failed[1]
    return "nothing" if done.returncode == 0 else f"pytest ended with {done.returncode}: {done.stdout[-500:]}"


def main(arguments: list[str]) -> int:
    if not arguments:
        print(__doc__, file=sys.stderr)
        return 2
    folder, words = Path(arguments[0]).resolve(), arguments[1:]
    copied(folder)
    missed = 0
    for fault in FAULTS:
        if words and not any(word in f"{fault.file} {fault.what}" for word in words):
            continue
        found = found_by(fault, folder)
        missed += not found.startswith("tests/")
        print(f"{fault.file}: {fault.what}: {found}", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
