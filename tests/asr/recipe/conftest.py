# SPDX-License-Identifier: Apache-2.0
import beeps
import pytest
import tiny_runs
from steps import one_thread


@pytest.fixture(scope="session")
def single_thread():
    """Sets one thread for fixtures of the session, which come before a test's: another number rounds otherwise."""
    return one_thread


@pytest.fixture(scope="session")
def recordings(tmp_path_factory):
    return beeps.folder(tmp_path_factory.mktemp("beeps"))


@pytest.fixture(scope="session")
def speech_sets(recordings):
    pytest.importorskip("kaldi_native_fbank", reason="features need the extra fastasr[asr]")
    pytest.importorskip("kaldialign", reason="error rates need the extra fastasr[asr]")
    from fastasr.asr.recipe import speech

    return speech.load(None, recordings, speeds=(1.0, 1.1), say=lambda text: None)


@pytest.fixture(scope="session")
def trained(tmp_path_factory, speech_sets, single_thread):
    """Trains a run of 6 steps without a break."""
    out = tmp_path_factory.mktemp("trained")
    with single_thread():
        tiny_runs.trainer(out, speech_sets, steps=6).run()
    return out
