# SPDX-License-Identifier: Apache-2.0
"""What is noted of calls that leave the fast path: per object, logged once a class, nothing under torch.compile."""

import copy
import gc
import logging
import threading
import weakref

import torch

from fastasr import _left


def test_a_reason_is_logged_once_per_class_and_method(caplog):
    one, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    for module in (one, one, other):
        _left.note(module, "it rains")
    _left.note(one, "it rains", "streaming_forward")
    _left.note(one, "it snows")
    _left.note(one, "it rains")
    message = "Linear.{} leaves fastasr's fast path: {}".format
    assert [(r.name, r.levelno, r.getMessage()) for r in caplog.records] == [
        ("fastasr", logging.WARNING, message(*what))
        for what in (("forward", "it rains"), ("streaming_forward", "it rains"), ("forward", "it snows"))
    ]
    noted = _left.of(one)
    assert (noted["forward"].reason, noted["forward"].calls) == ("it rains", 4)
    assert noted["streaming_forward"].calls == _left.of(other)["forward"].calls == 1
    assert _left.of(torch.nn.Linear(2, 2)) == {}


def test_notes_die_with_their_object_and_are_not_copied():
    module = torch.nn.Linear(2, 2)
    _left.note(module, "it rains")
    assert _left.of(copy.deepcopy(module)) == {}
    assert not any("left" in name for name in vars(module))
    count, gone = len(_left._left), weakref.ref(module)
    del module
    gc.collect()
    assert gone() is None
    assert len(_left._left) < count


def test_parameters_are_told_apart_by_identity():
    one, other = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    _left.note(one, "it rains")
    assert "forward" in _left.of(one)
    assert _left.of(other) == {}


def test_ignored_holds_for_this_thread_alone(caplog):
    module = torch.nn.Linear(2, 2)
    with _left.ignored():
        _left.note(module, "it rains")
        with _left.ignored():
            pass
        _left.note(module, "it rains")
        assert _left.of(module) == {}
        thread = threading.Thread(target=_left.note, args=(module, "it snows"))
        thread.start()
        thread.join()
    assert _left.of(module)["forward"].reason == "it snows"
    assert len(caplog.records) == 1


def test_a_compiled_call_notes_nothing_and_breaks_no_graph(caplog):
    class Leaving(torch.nn.Module):
        def forward(self, x):
            _left.note(self, "it rains")
            return x + 1

    module = Leaving()
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.zeros(2)), torch.ones(2))
    assert _left.of(module) == {}
    exported = torch.export.export(module, (torch.zeros(2),)).module()
    assert torch.equal(exported(torch.zeros(2)), torch.ones(2))
    assert not [record for record in caplog.records if record.name == "fastasr"]
    assert torch.equal(module(torch.zeros(2)), torch.ones(2))
    assert _left.of(module)["forward"].calls == 1
