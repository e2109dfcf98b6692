# SPDX-License-Identifier: Apache-2.0
"""Child processes that are killed, or that read what may crash or hang them, and files that are not as they were."""

import multiprocessing
import re
import resource
import signal
import time
from pathlib import Path

# Its children start with torch imported, in milliseconds.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["torch", "fastasr.ops", "fastasr.asr.recipe.checkpoints", "fastasr.benchmarks.rows"]
)
PATIENCE_S = 60
MEMORY = 1 << 30  # bytes, above what a child has at its start


def kill(draw, work, *arguments):
    """Starts ``work(ready, *arguments)`` and kills it at a random moment after it has called ``ready()``."""
    here, there = CONTEXT.Pipe(duplex=False)
    child = CONTEXT.Process(target=_work, args=(there, work, arguments))
    child.start()
    there.close()
    assert here.poll(PATIENCE_S)
    here.recv()  # EOFError: it has failed
    time.sleep(draw.uniform(0, 0.1))
    child.kill()
    child.join()
    assert child.exitcode == -signal.SIGKILL


def _work(there, work, arguments):
    work(lambda: there.send("ready"), *arguments)


def run(function, *arguments):
    """Returns what ``function(*arguments)`` returns in a child."""
    (found,) = each(function, [arguments])
    assert found[0] == "returned", found
    return found[1]


def each(function, calls, memory=None):
    """Calls ``function(*arguments)`` in a child for each of ``calls``. Yields ("returned", value), ("raised", name,
    text), or ("ended", reason) if the child crashed or was silent for too long; the next call then has a new child.
    ``memory``: bytes that the child may add to its address space.
    """
    left = list(calls)
    while left:
        here, there = CONTEXT.Pipe(duplex=False)
        child = CONTEXT.Process(target=_each, args=(there, function, left, memory))
        child.start()
        there.close()
        try:
            while left:
                if not here.poll(PATIENCE_S):
                    yield "ended", f"silent for {PATIENCE_S} s"
                    left.pop(0)
                    break
                yield here.recv()
                left.pop(0)
        except EOFError:
            child.join()
            yield "ended", f"exit code {child.exitcode}"
            left.pop(0)
        finally:
            child.kill()
            child.join()


def _each(there, function, calls, memory):
    if memory:
        used = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10
        resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for arguments in calls:
        try:
            there.send(("returned", function(*arguments)))
        except BaseException as error:
            there.send(("raised", type(error).__name__, str(error)[:300]))


_HUGE = [0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, (1 << 63) - 1, (1 << 64) - 1]


def mutated(content, draw):
    """Returns the bytes with flipped bits, cut, with a huge length somewhere, or with a part removed or repeated.

    Half of the places are in the first 256 bytes, where headers are.
    """
    made = bytearray(content)

    def place():
        return draw.randrange(min(256, len(made)) if draw.random() < 0.5 else len(made))

    for _ in range(draw.choice((1, 1, 2, 8))):
        at, kind = place(), draw.choice(("flip", "flip", "cut", "huge", "huge", "remove", "repeat"))
        if kind == "flip":
            made[at] ^= 1 << draw.randrange(8)
        elif kind == "cut":
            del made[max(1, at) :]
        elif kind == "huge":
            number = draw.choice(_HUGE)
            size = draw.choice([n for n in (1, 2, 4, 8) if number < 1 << 8 * n])
            made[at : at + size] = number.to_bytes(size, draw.choice(("little", "big")))
        else:
            part = made[at : at + draw.randrange(1, 64)]
            made[at : at + len(part)] = b"" if kind == "remove" else part + part
        made = made or bytearray(b"\0")
    return bytes(made)


def mutated_text(text, draw):
    """Returns the text with other numbers, values of other types, or as ``mutated`` does, as bytes."""
    kind = draw.choice(("number", "number", "value", "bytes"))
    spots = list(re.finditer(r"-?\b\d+(\.\d+)?\b" if kind == "number" else r'"[^"\n]*"|\b\w+\b', text))
    if kind == "bytes" or not spots:
        return mutated(text.encode(), draw)
    spot = draw.choice(spots)
    values = {
        "number": ("0", "-1", "7", "1000", "1000000", "1000000000000", "1e400", "NaN", "2.5", "9" * 5000),
        "value": ("null", "[]", "{}", '""', "true", "-3", "[" * 20000, '["' + "a" * 9 + '"]', '"\\ud800"'),
    }[kind]
    return (text[: spot.start()] + draw.choice(values) + text[spot.end() :]).encode()
