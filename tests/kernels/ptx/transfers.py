# SPDX-License-Identifier: Apache-2.0
"""The instructions that load and store, and the copies from global to shared memory that a kernel waits for."""

import numpy as np

from .arithmetic import BITS, UNSIGNED
from .machine import maker
from .memory import POISON, Fault


def address_of(machine, text: str, kind: str):
    """Returns the slot of an address and what is added to it."""
    inner = text[1:-1]
    base, plus, offset = inner.partition("+")
    if not plus and "-" in inner[1:]:
        base, _, offset = inner.partition("-")
        offset = "-" + offset
    dtype = UNSIGNED[BITS[kind]]
    return machine.source(base, kind), dtype(int(offset or "0", 0) & int(np.iinfo(dtype).max))


def _width(operation) -> tuple[int, int]:
    count = next((int(o[1:]) for o in operation if o in ("v2", "v4", "v8")), 1)
    return BITS[operation[-1]] // 8, count


@maker("ld")
def _load(machine, operation, operands):
    size, count = _width(operation)
    if operation[1] == "param":
        return _load_parameter(machine, operation, operands, size)
    targets = [machine.slot(o) for o in (operands[0] if isinstance(operands[0], tuple) else (operands[0],))]
    assert len(targets) == count
    there = operation[1] == "global"
    slot, offset = address_of(machine, operands[1], "u64" if there else "u32")

    def load(m, mask):
        address = m.get(slot) + offset
        m.watch(there, address, mask, size * count)
        if there:
            shape = np.broadcast_shapes(address.shape, (1, 1) if mask is None else mask.shape)
            chosen = slice(None) if mask is None else np.flatnonzero(np.broadcast_to(mask, shape))
            flat = np.broadcast_to(address, shape).reshape(-1)
            found = np.zeros((count, flat.size), UNSIGNED[8 * size])
            found[:, chosen] = m.memory.load(flat[chosen], size, count)
            values = found.reshape(count, *shape)
        else:
            address = address if mask is None else np.where(mask, address, np.uint32(0))
            values = m.shared.load(np.arange(m.programs)[:, None], address, size, count)
        for target, value in zip(targets, values, strict=True):
            m.put(target, value if size > 1 else value.astype(np.uint16), mask)

    return load


def _load_parameter(machine, operation, operands, size):
    target = machine.slot(operands[0])
    slot, offset = address_of(machine, operands[1], "u64")
    extended = operation[-1] == "s32" and operands[0].startswith("%rd")

    def load(m, mask):
        places = m.get(slot).astype(np.int64)[..., None] + (int(offset) + np.arange(size))
        value = m.parameters[places].view(UNSIGNED[8 * size])[..., 0]
        m.put(target, value.view(np.int32).astype(np.int64).view(np.uint64) if extended else value, mask)

    return load


@maker("st")
def _store(machine, operation, operands):
    size, count = _width(operation)
    there = operation[1] == "global"
    slot, offset = address_of(machine, operands[0], "u64" if there else "u32")
    given = operands[1] if isinstance(operands[1], tuple) else (operands[1],)
    assert len(given) == count
    sources = [machine.source(o, "b16" if size == 1 else operation[-1]) for o in given]

    def store(m, mask):
        address = m.get(slot) + offset
        m.watch(there, address, mask, size * count)
        values = [m.get(s) for s in sources]
        masks = (1, 1) if mask is None else mask.shape
        shape = np.broadcast_shapes(address.shape, *(v.shape for v in values), masks)
        if not there:
            shape = m.programs, shape[1]
        chosen = slice(None) if mask is None else np.flatnonzero(np.broadcast_to(mask, shape))
        flat = np.broadcast_to(address, shape).reshape(-1)[chosen]
        values = [np.broadcast_to(v, shape).reshape(-1)[chosen].astype(UNSIGNED[8 * size]) for v in values]
        if there:
            m.memory.store(flat, values, size)
        else:
            m.shared.store(np.arange(m.programs).repeat(shape[1])[chosen], flat, values, size)

    return store


@maker("cp")
def _copy(machine, operation, operands):
    if operation[2] == "commit_group":

        def commit(m, mask):
            m.committed[m.whole_programs(mask)] += 1

        return commit
    if operation[2] in ("wait_group", "wait_all"):
        left = int(operands[0], 0) if operands else 0

        def wait(m, mask):
            active = m.whole_programs(mask)
            kept = []
            for group, programs, addresses, data in m.copies:
                done = active[programs] & (group < m.committed[programs] - left)
                m.shared.store(programs[done], addresses[done], list(data[:, done]), 4)
                if not done.all():
                    kept.append((group[~done], programs[~done], addresses[~done], data[:, ~done]))
            m.copies = kept

        return wait
    to, to_offset = address_of(machine, operands[0], "u32")
    of, of_offset = address_of(machine, operands[1], "u64")
    width = int(operands[2], 0)
    read = machine.source(operands[3] if len(operands) > 3 else str(width), "u32")  # bytes; the rest is zero
    count = width // 4

    def copy(m, mask):
        sizes = m.whole(m.get(read))
        if ((sizes != 0) & (sizes != width)).any():
            raise Fault("a copy of a part")
        chosen = np.flatnonzero(np.ones_like(sizes, bool) if mask is None else m.whole(mask))
        full = sizes.reshape(-1)[chosen] == width
        addresses = m.whole(m.get(to) + to_offset)
        sources = m.whole(m.get(of) + of_offset)
        m.watch(True, sources, sizes > 0 if mask is None else (sizes > 0) & mask, width)
        m.watch(False, addresses, mask, width)
        addresses, programs = addresses.reshape(-1)[chosen], chosen // m.threads
        data = np.zeros((count, chosen.size), np.uint32)
        data[:, full] = m.memory.load(sources.reshape(-1)[chosen][full], 4, count)
        m.shared.store(programs, addresses, [np.full(chosen.size, POISON * 0x01010101, np.uint32)] * count, 4)
        m.copies.append((m.committed[programs], programs, addresses, data))

    return copy
