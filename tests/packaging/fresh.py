# SPDX-License-Identifier: Apache-2.0
"""Fresh environments that hold one wheel, and commands run in them."""

import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
# Without them a measurement would choose the product, and the user's folder would keep the choice.
OF_THE_RUN = ("FASTASR_CACHE", "FASTASR_GEMM")


def _clean(environment: dict[str, str]) -> dict[str, str]:
    """Returns this process's environment without what would change an import; this Python's tools are on PATH."""
    left_out = ("PYTHON", "FASTASR", "TRITON")
    kept = {k: v for k, v in os.environ.items() if k in OF_THE_RUN or not k.startswith(left_out)}
    kept["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", "")])
    return kept | environment


def run(*command, **environment) -> str:
    """Returns the standard output of a command; a failure shows both streams."""
    cwd = environment.pop("cwd", None)
    done = subprocess.run(
        [str(c) for c in command],
        cwd=cwd,
        env=_clean(environment),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


class Fresh:
    """A new environment that holds one wheel, if one is given. ``python(code)`` runs outside the repository."""

    def __init__(self, folder: Path, wheel: Path | None = None) -> None:
        self.folder = folder
        run(sys.executable, "-m", "venv", "--without-pip", folder)
        self.bin = folder / "bin"
        self.pip = (sys.executable, "-m", "pip", "--python", self.bin / "python")
        if wheel is not None:
            run(*self.pip, "install", "--no-deps", "--no-index", wheel)
        (self.packages,) = (folder / "lib").glob("python*/site-packages")
        # These come after the wheel's own packages, and that folder's .pth files (an editable fastasr) are not read.
        (self.packages / "torch-from-elsewhere.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
        (folder / "elsewhere").mkdir()

    def python(self, code: str, **environment) -> str:
        return run(self.bin / "python", "-c", code, cwd=self.folder / "elsewhere", **environment)

    def command(self, *arguments: str, **environment) -> str:
        return run(self.bin / "fastasr", *arguments, cwd=self.folder / "elsewhere", **environment)
