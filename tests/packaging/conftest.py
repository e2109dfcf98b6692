# SPDX-License-Identifier: Apache-2.0
"""The package as a user gets it: a source distribution, wheels made from it, and fresh environments with them.

Nothing is downloaded. The fresh environments see this environment's torch behind their own packages.
"""

import os
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from fresh import ROOT, Fresh, run

NOT_SOURCE = (".*", "build", "dist", "demo", "bench-report", "*.egg-info", "__pycache__", "*.so")
KEEP_HIDDEN = (".ci", ".clang-format", ".gitignore")


def pytest_collection_modifyitems(items):
    if os.environ.get("FASTASR_TEST_PACKAGING", "1") == "0":
        for item in items:
            if item.get_closest_marker("packaging"):
                item.add_marker(pytest.mark.skip(reason="FASTASR_TEST_PACKAGING=0"))


def _ignore(folder: str, names: list[str]) -> set[str]:
    top = Path(folder) == ROOT
    ignored = shutil.ignore_patterns(*NOT_SOURCE)(folder, names)
    # demo/ and build/ are products at the top only
    return {n for n in ignored if n not in KEEP_HIDDEN and (top or n not in ("demo", "build", "dist"))}


@pytest.fixture(scope="session")
def sdist(tmp_path_factory) -> Path:
    """Builds the source distribution from a copy of the sources alone."""
    work = tmp_path_factory.mktemp("sdist")
    shutil.copytree(ROOT, work / "source", ignore=_ignore)
    run(
        sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", work / "dist", work / "source"
    )
    (archive,) = (work / "dist").iterdir()
    return archive


def _wheel(sdist: Path, work: Path, **environment) -> Path:
    with tarfile.open(sdist) as archive:
        archive.extractall(work, filter="data")
    (source,) = work.iterdir()
    out = work / "dist"
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, source, **environment)
    (wheel,) = out.iterdir()
    return wheel


@pytest.fixture(scope="session")
def wheel(sdist, tmp_path_factory) -> Path:
    """Builds the wheel with the native library from the source distribution."""
    return _wheel(sdist, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def pure_wheel(sdist, tmp_path_factory) -> Path:
    """Builds the wheel of FASTASR_NATIVE=0."""
    return _wheel(sdist, tmp_path_factory.mktemp("pure"), FASTASR_NATIVE="0")


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory) -> Fresh:
    return Fresh(tmp_path_factory.mktemp("installed") / "venv", wheel)


@pytest.fixture(scope="session")
def installed_pure(pure_wheel, tmp_path_factory) -> Fresh:
    return Fresh(tmp_path_factory.mktemp("installed-pure") / "venv", pure_wheel)


@pytest.fixture(scope="session")
def library(wheel, tmp_path_factory) -> Path:
    """Extracts the native library from the wheel."""
    folder = tmp_path_factory.mktemp("library")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.startswith("fastasr/_C."))
        return Path(archive.extract(name, folder))
