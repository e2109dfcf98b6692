# SPDX-License-Identifier: Apache-2.0
"""The instructions that a warp, or four, take as one: shuffles, reductions, matrices and their products."""

import numpy as np

from . import tensor_cores
from .arithmetic import decode, encode
from .machine import maker
from .memory import Fault
from .transfers import address_of


@maker("shfl")
def _shuffle(machine, operation, operands):
    mode = operation[2]
    target, a = machine.slot(operands[0]), machine.source(operands[1], "b32")
    b, c = (machine.source(o, "u32") for o in operands[2:4])

    def shuffle(m, mask):
        values = m.get(a)
        m.whole_warps(mask)
        if values.shape[1] == 1:
            m.put(target, values, mask)
            return
        values, lane, amount = m.warps(values), np.arange(32), m.warps(m.get(b)).astype(np.int64)
        bounds = int(m.get(c)[0, 0])
        segment, clamp = (bounds >> 8) & 31, bounds & 31
        first, last = lane & segment, (lane & segment) | (clamp & ~segment & 31)
        other = {
            "bfly": lane ^ amount,
            "idx": first | (amount & ~segment & 31),
            "up": lane - amount,
            "down": lane + amount,
        }[mode]
        other = np.where(other >= last if mode == "up" else other <= last, other, lane)
        m.put(target, np.take_along_axis(values, other, -1).reshape(m.programs, -1), mask)

    return shuffle


@maker("redux")
def _reduce(machine, operation, operands):
    kind = operation[-1]
    target, a = machine.slot(operands[0]), machine.source(operands[1], kind)
    function = {"max": np.max, "min": np.min, "add": np.sum}[operation[2]]

    def reduce(m, mask):
        values = decode(m.warps(m.get(a)), kind)
        out = function(values, axis=-1, keepdims=True).astype(values.dtype)
        m.put(target, encode(np.broadcast_to(out, values.shape).reshape(m.programs, -1), kind), mask)

    return reduce


def _check_rows(m, places):
    """Counts an access to eight rows of a matrix, and checks where they begin."""
    if m.trace is not None:
        m.trace.access(False, places, None, 16)
    if (places & np.uint32(15)).any():
        raise Fault("a row of a matrix is not aligned")


@maker("ldmatrix")
def _load_matrix(machine, operation, operands):
    targets = [machine.slot(o) for o in operands[0]]
    slot, offset = address_of(machine, operands[1], "u32")
    transposed = "trans" in operation

    def load(m, mask):
        m.whole_warps(mask)
        address = m.warps(m.get(slot) + np.uint32(offset))
        if mask is not None:
            address = np.where(m.warps(mask), address, np.uint32(0))
        programs = np.arange(m.programs)[:, None, None]
        for i, target in enumerate(targets):
            places = address[..., 8 * i : 8 * i + 8]
            _check_rows(m, places)
            rows = np.stack(m.shared.load(programs, places, 4, 4), -1)
            m.put(target, tensor_cores.matrices_of_rows(rows, transposed).reshape(m.programs, -1), mask)

    return load


@maker("stmatrix")
def _store_matrix(machine, operation, operands):
    slot, offset = address_of(machine, operands[0], "u32")
    sources = [machine.slot(o) for o in operands[1]]
    transposed = "trans" in operation

    def store(m, mask):
        m.whole_warps(mask)
        address = m.warps(m.get(slot) + np.uint32(offset))
        chosen = None if mask is None else m.warps(mask)[..., :8]
        for i, source in enumerate(sources):
            registers = m.warps(m.get(source))
            p, w = registers.shape[:2]
            rows = registers.reshape(p, w, 8, 4)
            if transposed:
                rows = tensor_cores.matrices_of_rows(rows, True).reshape(p, w, 8, 4)
            places = address[..., 8 * i : 8 * i + 8]
            _check_rows(m, places)
            programs = np.broadcast_to(np.arange(m.programs)[:, None, None], places.shape)
            if chosen is not None:
                places, programs, rows = places[chosen], programs[chosen], rows[chosen]
            m.shared.store(programs, places, [rows[..., j] for j in range(4)], 4)

    return store


@maker("mma")
def _mma(machine, operation, operands):
    kinds = operation[-4:]
    kind = kinds[1]
    if operation[3] not in ("m16n8k16", "m16n8k8") or kinds[0] != "f32" or kinds[3] != "f32":
        raise Fault(f"unknown product {operation}")
    targets = [machine.slot(o) for o in operands[0]]
    a, b, c = ([machine.source(o, "b32") for o in part] for part in operands[1:4])

    def multiply(m, mask):
        m.whole_warps(mask)
        left, right, total = ([m.warps(m.get(s)) for s in part] for part in (a, b, c))
        out = tensor_cores.product(
            tensor_cores.fragment_a(left, kind),
            tensor_cores.fragment_b(right, kind),
            tensor_cores.fragment_c(total),
        )
        for target, value in zip(targets, tensor_cores.registers_c(out), strict=True):
            m.put(target, value.reshape(m.programs, -1), mask)

    return multiply


@maker("wgmma")
def _wgmma(machine, operation, operands):
    if operation[1] != "mma_async":
        return lambda m, mask: None
    shape, kind = operation[4], operation[-1]
    n, k = (int(v) for v in shape[4:].split("k"))
    targets = [machine.slot(o) for o in operands[0]]
    from_registers = isinstance(operands[1], tuple)
    a = [machine.slot(o) for o in operands[1]] if from_registers else machine.slot(operands[1])
    b, accumulate = machine.slot(operands[2]), operands[3]
    rest = [int(o) for o in operands[4:]]
    if rest[:2] != [1, 1]:
        raise Fault("a product with negated operands")
    transposed = [bool(v) for v in rest[2:]] or [False, False]
    b_transposed, a_transposed = transposed[-1], transposed[0] and not from_registers
    size = 4 if kind == "tf32" else 2
    literal = accumulate.lstrip("-").isdigit()
    chosen = None if literal else machine.slot(accumulate)

    def numbers(words):
        if kind == "tf32":
            return (words & np.uint32(0xFFFFE000)).view(np.float32)
        return decode(words, kind).astype(np.float32)

    def multiply(m, mask):
        groups = m.threads // 128
        active = m.whole_programs(mask)
        first = int(np.argmax(active))
        keep = np.array(bool(int(accumulate))) if literal else m.whole(m.get(chosen))[:, :1, None]
        # in registers that a product without an old sum is the first to write
        nothing = np.zeros((1, 1), np.uint32)
        old = [m.warps(nothing if m.registers[t] is None else m.registers[t]) for t in targets]
        c = np.stack([tensor_cores.fragment_c(old[4 * i : 4 * i + 4]) for i in range(n // 8)], -2)
        c = c.reshape(m.programs, -1, 16, n)  # programs, warps, rows, columns
        whole_b, whole_a = m.whole(m.get(b)), None if from_registers else m.whole(m.get(a))
        matrix_a = tensor_cores.fragment_a([m.warps(m.get(s)) for s in a], kind) if from_registers else None
        out = np.zeros_like(c)
        for g in range(groups):
            warps = slice(4 * g, 4 * g + 4)
            descriptor = np.where(active, whole_b[:, 128 * g], whole_b[first, 128 * g])
            right = numbers(tensor_cores.shared_operand(m.shared.bytes, descriptor, n, k, size, b_transposed))
            if from_registers:
                left = matrix_a[:, warps].reshape(m.programs, 64, k)
            else:
                descriptor = np.where(active, whole_a[:, 128 * g], whole_a[first, 128 * g])
                left = numbers(
                    tensor_cores.shared_operand(m.shared.bytes, descriptor, 64, k, size, a_transposed)
                )
            before = np.where(keep, c[:, warps].reshape(m.programs, 64, n), np.float32(0))
            product = tensor_cores.product(left, right.transpose(0, 2, 1), before)
            out[:, warps] = product.reshape(m.programs, 4, 16, n)
        for i in range(n // 8):
            for j, value in enumerate(
                tensor_cores.registers_c(np.ascontiguousarray(out[..., 8 * i : 8 * i + 8]))
            ):
                m.put(targets[4 * i + j], value.reshape(m.programs, -1), mask)

    return multiply
