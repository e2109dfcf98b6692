# SPDX-License-Identifier: Apache-2.0
"""Saves and restores random states and everything that a run changes in a model."""

import random

import torch

_PLAIN = (int, float, bool, str, type(None))


class RandomState:
    """Python's and torch's random states on every device. As a context manager it restores them at the end."""

    def __init__(self):
        self._take()

    @classmethod
    def now(cls):
        return cls()

    def _take(self):
        self.python = random.getstate()
        self.cpu = torch.get_rng_state()
        initialised = torch.cuda.is_available() and torch.cuda.is_initialized()
        self.cuda = torch.cuda.get_rng_state_all() if initialised else []

    def restore(self):
        random.setstate(self.python)
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)

    def __eq__(self, other):
        return (
            self.python == other.python
            and torch.equal(self.cpu, other.cpu)
            and len(self.cuda) == len(other.cuda)
            and all(torch.equal(a, b) for a, b in zip(self.cuda, other.cuda, strict=True))
        )

    __hash__ = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.restore()


class ModelState:
    """Restores training flags, buffers and plain attributes of all modules when the context ends.

    Plain attributes are numbers, strings and None on modules and on the small helper objects that they own (upstream's
    regularisers adapt their probabilities and cutoffs during a run), and dicts of modules (caches).
    """

    def __init__(self, model):
        self.model = model

    def __enter__(self):
        self.buffers = [(b, b.detach().clone()) for b in self.model.buffers()]
        self.plain, self.dicts = [], []
        for module in self.model.modules():
            self.plain.append((vars(module), _plain(vars(module))))
            for name, value in vars(module).items():
                if type(value) is dict and not name.startswith("_"):
                    self.dicts.append((value, dict(value)))
            for value in vars(module).values():
                if _is_helper(value):
                    self.plain.append((vars(value), _plain(vars(value))))
        return self

    def __exit__(self, *_):
        for namespace, saved in self.plain:
            namespace.update(saved)
        for value, saved in self.dicts:
            value.clear()
            value.update(saved)
        with torch.no_grad():
            for buffer, saved in self.buffers:
                buffer.copy_(saved)


def _plain(namespace):
    return {key: value for key, value in namespace.items() if isinstance(value, _PLAIN)}


def _is_helper(value):
    kind = type(value)
    return (
        hasattr(value, "__dict__")
        and kind.__module__ not in ("builtins", "collections", "types", "functools")
        and not isinstance(value, (torch.nn.Module, torch.Tensor, type))
        and not kind.__module__.startswith(("torch", "fastasr"))
        and not callable(getattr(kind, "__get__", None))
    )
