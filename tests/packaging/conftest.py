# SPDX-License-Identifier: Apache-2.0
"""The package as a user gets it: a source distribution, wheels made from it, and fresh environments with them.

Nothing is downloaded. The fresh environments see this environment's torch behind their own packages.
"""

import os
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from fresh import ROOT, Fresh, run


def pytest_collection_modifyitems(items):
    if os.environ.get("FASTASR_TEST_PACKAGING", "1") == "0":
        for item in items:
            if item.get_closest_marker("packaging"):
                item.add_marker(pytest.mark.skip(reason="FASTASR_TEST_PACKAGING=0"))


@pytest.fixture(scope="session")
def dist() -> Path:
    """Returns the folder of the source distribution and the wheel; makes them where a source is newer."""
    made = ROOT / "build/dist/.made"
    folders = ("csrc", "fastasr", "kernels", "benchmarks", "tests")
    sources = (
        p for folder in folders for p in (ROOT / folder).rglob("*.*") if p.suffix not in (".pyc", ".so")
    )
    if not made.exists() or any(p.stat().st_mtime > made.stat().st_mtime for p in sources):
        run(ROOT / "scripts/build_dist.sh", sys.executable, cwd=ROOT)
        made.touch()
    return made.parent


@pytest.fixture(scope="session")
def sdist(dist) -> Path:
    (archive,) = dist.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="session")
def wheel(dist) -> Path:
    """Returns the wheel with the native library, made from the source distribution."""
    (wheel,) = dist.glob("*.whl")
    return wheel


@pytest.fixture(scope="session")
def pure_wheel(sdist, tmp_path_factory) -> Path:
    """Builds the wheel of FASTASR_NATIVE=0 from the source distribution."""
    work = tmp_path_factory.mktemp("pure")
    with tarfile.open(sdist) as archive:
        archive.extractall(work, filter="data")
    (source,) = work.iterdir()
    command = (sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", work / "dist", source)
    run(*command, FASTASR_NATIVE="0")
    (wheel,) = (work / "dist").iterdir()
    return wheel


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory) -> Fresh:
    return Fresh(tmp_path_factory.mktemp("installed") / "venv", wheel)


@pytest.fixture(scope="session")
def installed_pure(pure_wheel, tmp_path_factory) -> Fresh:
    return Fresh(tmp_path_factory.mktemp("installed-pure") / "venv", pure_wheel)


@pytest.fixture(scope="session")
def library(wheel, tmp_path_factory) -> Path:
    """Extracts the native library from the wheel, beside the module that says how it was built."""
    folder = tmp_path_factory.mktemp("library")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder, [n for n in archive.namelist() if n.endswith(".so")])
    return folder / "fastasr/libfastasr.so"
