# SPDX-License-Identifier: Apache-2.0
"""The blocks of code in the pages run as they are written, by a reader who has torch, the frameworks and the wheel."""

import importlib.util
import json
import shlex
from pathlib import Path

import pytest
from fresh import ROOT, Fresh, run
from page_blocks import FRAMEWORKS, OPS, PAGES, blocks

pytestmark = [pytest.mark.packaging]


class Reader:
    """A reader in a clone, whose shell finds ``python``, ``pip`` and ``fastasr`` of an environment without fastasr. pip
    downloads nothing: what its lines name, but the wheel, is installed beside torch.
    """

    def __init__(self, folder: Path, dist: Path) -> None:
        fresh = Fresh(folder / "venv")
        pip = fresh.bin / "pip"
        pip.write_text(f'#!/bin/sh\nexec {shlex.join(map(str, fresh.pip))} "$@"\n', encoding="utf-8")
        pip.chmod(0o755)
        self.python, self.clone = fresh.bin / "python", folder / "clone"
        (self.clone / "build").mkdir(parents=True)
        for name, target in {"build/dist": dist, "examples": ROOT / "examples"}.items():
            (self.clone / name).symlink_to(target)
        self.environment = {
            "PATH": f"{fresh.bin}:/usr/local/bin:/usr/bin:/bin",
            "PIP_NO_INDEX": "1",
            "PIP_QUIET": "1",
            "HF_HUB_OFFLINE": "1",
            "COLUMNS": "400",  # tables break no cell
        }

    def read(self, *pages: Path) -> None:
        """Runs the blocks of the pages that need nothing."""
        found = [
            (str(page), [(b.line, b.language, b.file, b.code) for b in blocks(page) if not b.needs])
            for page in pages
        ]
        file = self.clone / "blocks.json"
        file.write_text(json.dumps(found), encoding="utf-8")
        script = Path(__file__).with_name("read_pages.py")
        run(self.python, script, file, cwd=self.clone, **self.environment)


@pytest.fixture(scope="module")
def reader(dist, tmp_path_factory) -> Reader:
    """Returns a reader who has done what the README says, from the installation to the first report."""
    for name in ("transformers", "speechbrain", "zipformer", "torchaudio", "espnet2", "rich", "typer"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed: scripts/install_peers.sh")
    reader = Reader(tmp_path_factory.mktemp("reader"), dist)
    reader.read(ROOT / "README.md")
    return reader


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_blocks_of_a_page_run(reader, page):
    if page.name != "README.md":  # which the reader has read
        reader.read(page)


@pytest.mark.parametrize("pages", [FRAMEWORKS, OPS], ids=["frameworks", "ops"])
def test_the_blocks_of_a_folder_run(reader, pages):
    reader.read(*pages)
