# SPDX-License-Identifier: Apache-2.0
"""Runs the programs of a cooperative launch, which wait for each other, in turns."""

import contextvars
import inspect
import os
import random
import threading

import numpy as np
from triton.runtime import interpreter

from fastasr.testing.seeds import seeded


class Turns:
    """One launch whose programs are threads, of which one runs at a time. After each atomic the next one is drawn, by
    the run's seed, among all that are not waiting for memory to change.
    """

    def __init__(self, executor, arguments, options):
        self.executor = executor
        function = executor.fn
        options = {name: value for name, value in options.items() if name in executor.arg_names}
        values = inspect.getcallargs(function, *arguments, **options)
        constants = executor.constexprs
        self.values = {n: v if n in constants else interpreter._implicit_cvt(v) for n, v in values.items()}
        self.random = random.Random(seeded("turns", os.environ.get("PYTEST_CURRENT_TEST")))
        self.resumed, self.paused = {}, threading.Semaphore(0)  # by place in the grid; of the one that runs
        self.waiting, self.error = set(), None

    def run(self) -> None:
        grid = (*self.executor.grid, 1, 1)[:3]
        interpreter.interpreter_builder.set_grid_dim(*grid)
        for place in np.ndindex(grid):
            context = contextvars.copy_context()  # what numpy ignores
            self.resumed[place] = threading.Semaphore(0)
            threading.Thread(target=context.run, args=(self._program, place), daemon=True).start()
        patched = interpreter._patch_lang(self.executor.fn)
        try:
            self._take_turns()
        finally:
            patched.restore()
        if self.error is not None:
            raise self.error

    def _take_turns(self) -> None:
        while self.resumed:
            able = [place for place in self.resumed if place not in self.waiting]
            if not able and self.error is None:
                self.error = AssertionError(
                    f"{self.executor.fn.__name__}: programs {sorted(self.waiting)} wait for ever"
                )
            place = self.random.choice(able or list(self.resumed))
            interpreter.interpreter_builder.set_grid_idx(*place)
            self.resumed[place].release()
            self.paused.acquire()

    def _program(self, place) -> None:
        self.resumed[place].acquire()
        try:
            if self.error is None:
                self.executor.fn(**self.values)
        except BaseException as error:
            self.error = self.error or error
        finally:
            del self.resumed[place]
            self.paused.release()

    def hand_over(self, waits: bool, changed: bool) -> None:
        """Lets another program go on, and returns when it is this one's turn again."""
        place = interpreter.interpreter_builder.grid_idx
        if changed:
            self.waiting.clear()
        if waits:
            self.waiting.add(place)
        self.paused.release()
        self.resumed[place].acquire()
        if self.error is not None:
            raise self.error
