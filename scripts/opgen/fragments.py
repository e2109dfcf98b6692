# SPDX-License-Identifier: Apache-2.0
"""Writes an op's code: the fragments that the templates leave open, from the declaration."""

import inspect
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator
from textwrap import indent

import torch

from fastasr.testing.declared import Declared
from fastasr.testing.declared.signature import TENSORS, Argument, Output
from opgen import templates

TRANSFORMED = "transforms_active() or forward_ad._current_level >= 0"  # _transforms.is_transformed()
LAYOUTS = {  # strides in a declaration -> the function that gives them
    "channels": "dense_channels",
    "rows": "rows",
    "matrix": "as_matrix",
    "vector": "as_vector",
    "int64": "as_int64",
    "any": "as_it_is",
}


def write(op: Declared) -> str:
    """Returns the code of an op, behind its imports."""
    parts = [templates.TOP, templates.PUBLIC]
    parts += [templates.NODE] * bool(op.differentiable) + [templates.OPERATOR]
    fragments = _fragments(op)
    return "\n\n".join(_render(part, fragments) for part in parts)


def _fragments(op: Declared) -> dict[str, str | list[str]]:
    grads = [f"grad_{o.name}" for o in op.graded]
    options = [a.name for a in op.options]
    gradients = [f"d_{a.name}" for a in op.differentiable]
    return {
        "name": op.name,
        "class_name": op.name.title().replace("_", ""),
        "family": op.op.family.name,
        "names": _names(op.arguments),
        "typed_parameters": _with_keywords(op.arguments, [*map(_parameter, op.arguments)]),
        "typed_arguments": ", ".join(f"{a.name}: {a.type_text}" for a in op.arguments),
        "operator_parameters": _operator_parameters(op),
        "overloads": _overloads(op),
        "return_type": " | ".join(_forms(op)),
        "docstring": _docstring(op.op.definition),
        "codes": [f"{_codes(a)} = {a.codes!r}" for a in op.options if a.codes],
        "arguments_tuple": _named_tuple("Arguments", [(a.name, a.type_text, a) for a in op.arguments]),
        "saved_tuple": _saved_tuple(op),
        "deciding": ", ".join(op.deciding),
        "rest": ", ".join(
            ["kernels", "direct", *options, *(f"({name}.shape, {name}.dtype)" for name in op.unread)]
        ),
        "likes": [f"{name} = make(Like, {name})" for name in op.unread],
        "rest_names": ", ".join(["kernels", "direct", *options, *op.unread]),
        "saves": ", ".join(op.saves),
        "saves_directly": ", ".join(name for name in op.saves if name not in op.unread),
        "saved": ", ".join(op.saves + options),
        "found": _names(op.found),
        "results": _results(op),
        "selected": _selected(op),
        "result_dtypes": f"({', '.join(_dtype(op, o, 'a.') for o in op.found)},)",
        "grads": ", ".join(grads),
        "optional_grads": ", ".join(
            g + "=None" * bool(o.flag) for g, o in zip(grads, op.graded, strict=True)
        ),
        "gradients": ", ".join(gradients),
        "gradients_tuple": _tuple(gradients),
        "keep": ", keep" * bool(op.keeps),
        "not_keeping": ", False" * bool(op.keeps),
        "keep_if_wanted": f", {_wanted(op)}" * bool(op.keeps),
        "needed": ", ctx.needs_input_grad[2:]" * op.asks,
        "materialize": ["ctx.set_materialize_grads(False)"] * (not op.materialize),
        "no_grads": _no_grads(op, grads),
        "checks": _checks(op),
        "launch": _launch(op),
        "sizes": _sizes(op),
        "empty": ", ".join(_empty(op, o) for o in op.found),
        "constants": _constants(op),
        "differentiate": _differentiate(op, grads),
        "transformed": TRANSFORMED,
        "forward": _node_forward(op),
        "not_views": [f"{o.name} = not_a_view({o.name})" for o in op.outputs],
        "native_backward": _native_backward(op, grads),
        "for_autograd": _for_autograd(op),
        "shortest_path": _shortest_path(op),
        "apply": _apply(op, False),
        "plain": " and ".join(_optional(a, f"type({a.name}) in PLAIN") for a in op.tensors),
        "formula": _formula(op),
        "cast": _cast(op),
        "formula_under_autocast": _formula_under_autocast(op),
        "schemas": _schemas(op),
        "written": _written(op),
    }


def _render(template: str, fragments: dict[str, str | list[str]]) -> str:
    """Puts fragments that are texts into their lines; fragments that are lists of lines stand alone on theirs."""
    lines = []
    for line in template.strip("\n").split("\n"):
        alone = re.fullmatch(r"( *)\{(\w+)\}", line)
        if not alone:
            line = line.format_map(fragments)
            target = re.fullmatch(r"( *)(.*), = (.*)", line)
            if target:
                line = f"{target[1]}{_tuple(target[2].split(', '))} = {target[3]}"
            lines.append(line)
            continue
        found = fragments[alone[2]]
        text = found if isinstance(found, str) else "\n".join(found)
        lines += indent(text, alone[1]).split("\n") if text else []
    return "\n".join(lines)


# --------------------------------------------------------------------------- names, types
def _names(named: Iterable[Argument | Output]) -> str:
    return ", ".join(a.name for a in named)


def _tuple(names: list[str]) -> str:
    return f"({names[0]},)" if len(names) == 1 else ", ".join(names)


def _codes(a: Argument) -> str:
    return f"{a.name.upper()}_CODES"


def _parameter(a: Argument) -> str:
    text = f"{a.name}: {a.type_text}"
    return text if a.required else f"{text} = {a.default!r}"


def _with_keywords(arguments: Iterable[Argument], parts: list[str]) -> str:
    keywords = [a.keyword_only for a in arguments]
    if any(keywords):
        parts.insert(keywords.index(True), "*")
    return ", ".join(parts)


def _operator_parameters(op: Declared) -> str:
    parts = [a.name if a.required else f"{a.name}={a.default!r}" for a in op.arguments]
    return ", ".join(parts + ["keep=False"] * bool(op.keeps))


def _returned(count: int) -> str:
    return "Tensor" if count == 1 else f"tuple[{', '.join(['Tensor'] * count)}]"


def _forms(op: Declared) -> list[str]:
    """Returns the type of the result; where a flag asks for more outputs, without and with them."""
    always = sum(not o.flag for o in op.outputs)
    return [_returned(count) for count in dict.fromkeys((always, len(op.outputs)))]


def _overloads(op: Declared) -> Iterator[str]:
    flag = op.outputs[-1].flag
    if not flag:
        return
    answers = ("Literal[False]", " = False"), ("Literal[True]", ""), ("bool", "")
    for (type_text, default), returned in zip(answers, (*_forms(op), " | ".join(_forms(op))), strict=True):
        parts = [f"{a.name}: {type_text}{default}" if a.name == flag else _parameter(a) for a in op.arguments]
        yield f"@overload\ndef {op.name}({_with_keywords(op.arguments, parts)}) -> {returned}: ..."


def _docstring(formula: Callable) -> str:
    doc = inspect.cleandoc(formula.__doc__ or "")
    quotes = '"""'
    return f"{quotes}{doc}\n{quotes}" if "\n" in doc else f"{quotes}{doc}{quotes}"


def _named_tuple(name: str, fields: list[tuple[str, str, Argument | None]]) -> list[str]:
    required = [a is None or a.required for _, _, a in fields]
    trailing = True not in required[required.index(False) :] if False in required else False
    lines = [f"class {name}(NamedTuple):"]
    for field, type_text, a in fields:
        default = f" = {a.default!r}" if a is not None and trailing and not a.required else ""
        lines.append(f"    {field}: {type_text}{default}")
    return lines


def _saved_tuple(op: Declared) -> list[str]:
    if not op.differentiable:
        return []
    types = {a.name: a.type_text for a in op.arguments}
    names = (*op.saves, *(a.name for a in op.options))
    return _named_tuple("Saved", [(name, types.get(name, "Tensor"), None) for name in names])


def _results(op: Declared) -> str:
    return ", ".join((*(o.name for o in op.outputs), *("_" for _ in op.keeps)))


def _selected(op: Declared) -> str:
    everything, flag = _names(op.outputs), op.outputs[-1].flag
    first = ", ".join(o.name for o in op.outputs if not o.flag)
    return f"({everything}) if {flag} else {first}" if flag else everything


def _formula(op: Declared) -> str:
    return f"formula({', '.join(f'{a.name}={a.name}' if a.keyword_only else a.name for a in op.arguments)})"


def _wanted(op: Declared) -> str:
    parts = (f"{a.name} is not None and " * a.optional + f"{a.name}.requires_grad" for a in op.differentiable)
    return f"is_grad_enabled() and ({' or '.join(parts)})"


def _apply(op: Declared, direct: bool) -> list[str]:
    call = f"return apply(kernels, {direct}, {_names(op.arguments)})"
    return [f"if {_wanted(op)}:\n    {call}"] * bool(op.differentiable)


def _optional(a: Argument, condition: str) -> str:
    return f"({a.name} is None or {condition})" if a.optional else condition


def _if_given(a: Argument, lines: Iterable[str], otherwise: Iterable[str] = ()) -> Iterator[str]:
    """Returns the lines; those of an optional argument run only where it is given."""
    body, other = "\n".join(lines), "\n".join(otherwise)
    if not a.optional or not body:
        yield from body.split("\n") if body else ()
        return
    yield f"if {a.name} is not None:\n{indent(body, '    ')}"
    if other:
        yield f"else:\n{indent(other, '    ')}"


# --------------------------------------------------------------------------- checks
def _checks(op: Declared) -> list[str]:
    lines = [line for a in op.options if not a.dimension_of for line in _if_given(a, _option(a))]
    known = op.known_sizes()
    for a in op.in_binding_order():
        before = set(known)
        body = [*_tensor(op, a, known)]
        others = {name for other in op.tensors if other is not a for name in other.pattern.names}
        lines += _if_given(a, body, (f"{name} = 0" for name in sorted((known - before) & others)))
        lines += _given_sizes(op) if a is op.leader else ()
    lines += [line for a in op.options if a.dimension_of for line in _if_given(a, _option(a))]
    lines += _one_dtype(op)
    part = op.op.check
    return lines + ([f"{_part(part)}(op, make(Arguments, ({_names(op.arguments)},)))"] if part else [])


def _part(function: Callable) -> str:
    return function.__name__


def _option(a: Argument) -> Iterator[str]:
    more = f", {_codes(a)}" if a.codes else ""
    yield f'if not ({_right_type(a)}):\n    op.wrong_{a.kind}("{a.name}", {a.name}{more})'
    if a.dimension_of:
        yield f'if not ({a.condition}):\n    op.wrong_dimension("{a.name}", {a.name}, {a.dimension_of})'
    elif a.constraint:
        yield f'if not ({a.condition}):\n    op.fail("{a.name}", "{a.expected}", {a.name})'


def _right_type(a: Argument) -> str:
    more = f" and {a.name} in {_codes(a)}" if a.codes else ""
    if a.kind == "pair":
        more = f" and len({a.name}) == 2 and type({a.name}[0]) is type({a.name}[1]) is int"
    return f"type({a.name}) is {a.type_name}{more}"


def _given_sizes(op: Declared) -> list[str]:
    arguments = f"Arguments({_names(op.arguments)})"
    return [f"{_tuple(n.split())} = {_part(size)}({arguments})" for n, size in op.sizes.items()]


def _tensor(op: Declared, a: Argument, known: set[str]) -> Iterator[str]:
    name, leader, pattern = a.name, op.leader.name, a.pattern
    dtypes, expected = TENSORS[a.kind]
    yield f"if not isinstance({name}, Tensor) or {name}.dtype not in {dtypes} or {name}.layout is not torch.strided:"
    yield f'    op.wrong_tensor("{name}", {name}' + (f', "{expected}")' if expected else ")")
    if a.kind == "constant":
        yield f'if {name}.requires_grad:\n    op.fail("{name}", "a constant", "a tensor that requires a gradient")'
    like = next(other.name for other in op.tensors if other.pattern == pattern)
    text = pattern.text_code(set(known), like if like != name else "")
    yield from pattern.check(known, name, f'op.wrong_shape("{name}", {name}, {text})')
    if name != leader:
        wrong = f'op.wrong_device("{name}", {name}, "{leader}", {leader})'
        yield f"if {name}.device != {leader}.device:\n    {wrong}"


def _one_dtype(op: Declared) -> Iterator[str]:
    first = op.one_dtype[0] if op.one_dtype else ""
    for name in op.one_dtype[1:]:
        wrong = f'op.wrong_dtype("{name}", {name}, "{first}", {first})'
        differs = f"{name}.dtype is not {first}.dtype and autocast_dtype({first}) is None"
        yield from _if_given(op.argument(name), [f"if {differs}:\n    {wrong}"])


# --------------------------------------------------------------------------- results without numbers
def _sizes(op: Declared) -> list[str]:
    lines, known = [], op.known_sizes()
    if op.keeps:  # the formula keeps nothing
        lines.append(f"keep = keep and family.kernels({', '.join(op.deciding)}) is not None")
    for a in op.in_binding_order():
        before = set(known)
        bound = list(a.pattern.bind(known, a.name))
        lines += _if_given(a, bound, (f"{name} = 0" for name in sorted(known - before)))
        lines += _given_sizes(op) if a is op.leader else ()
    if any(callable(o.pattern) for o in op.found):
        lines.append(f"arguments = Arguments({_names(op.arguments)})")
    return lines


def _empty(op: Declared, output: Output) -> str:
    asked = output.flag or ("keep" if output in op.keeps else "")
    dtype, device = _dtype(op, output), f"device={op.leader.name}.device"
    if op.like(output) and not asked:
        return f"torch.empty_like({op.like(output)}, dtype={dtype})"
    if callable(output.pattern):
        backend = f"family.kernels({', '.join(op.deciding)}).backend"
        shape = f"{_part(output.pattern)}({backend}, arguments)"
    else:
        shape = output.pattern.alternatives[0].tuple_code()
    shape += f" if {asked} else (0,)" * bool(asked)
    empty = "torch.empty"
    if output.name in op.strides and not asked:
        own = _part(op.strides[output.name])
        empty = f"(torch.empty if family.kernels({', '.join(op.deciding)}) is None else {own})"
    return f"{empty}({shape}, dtype={dtype}, {device})"


def _dtype(op: Declared, output: Output, prefix: str = "") -> str:
    if isinstance(output.dtype, torch.dtype):
        return str(output.dtype)
    names = ", ".join(prefix + name for name in op.dtype_names(output))
    return f"{'wide' if output.wide else 'promoted'}({names})"


# --------------------------------------------------------------------------- kernels
def _call(op: Declared, tokens: list[str], renamed: dict[str, str] | None = None) -> str:
    """Returns a kernel's arguments: choices as their codes, no number as 0, renamed ones, and the rest unchanged."""
    names = {a.name: f"{_codes(a)}[{a.name}]" for a in op.options if a.codes}
    names |= {a.name: f"{a.name} or 0" for a in op.options if a.kind == "int" and a.optional}
    names |= renamed or {}
    return ", ".join(names.get(token, token) for token in tokens)


def _operand(op: Declared, name: str, dtype: str) -> str:
    layout = op.layout(name)
    return f"operand({name}, {dtype}" + (f", {LAYOUTS[layout]})" if layout else ")")


def _operands(
    op: Declared, dtype: str, tokens: list[str], released: Iterable[str] = ()
) -> tuple[list[str], dict[str, str]]:
    """Returns lines that find the dtypes, and each tensor among the tokens as the kernels read it, except tensors
    whose memory was ``released``.
    """
    wide = [*op.wide, *(f"grad_{o.name}" for o in op.outputs if o.wide and op.wide)]
    if op.one_work_dtype:
        first, *others = op.deciding
        lines = [f"dtype = widest({first}, ({''.join(f'{o}, ' for o in others)}))"]
        dtype = "dtype"
    else:
        lines = [f'dtype = {dtype} if kernels.backend == "cpu" else None']
    # Triton's kernels widen what they load.
    work = f'work = None if kernels.backend == "triton" else promote_types({dtype}, torch.float32)'
    lines += [work] * bool(op.wide)
    found = {}
    for name in tokens:
        grad = name.startswith("grad_") and name not in {a.name for a in op.arguments}
        tensor = next((a for a in op.tensors if a.name == name and not (grad or name in released)), None)
        if not grad and tensor is None:
            continue
        floating = grad or tensor.kind == "floating"
        found[name] = _operand(op, name, "work" if name in wide else "dtype" if floating else "None")
    return lines, found


def _launch(op: Declared) -> list[str]:
    codes = {}
    for o in op.found:
        codes.setdefault(_dtype(op, o), f"{o.name}_dtype")
    first, *others = (f"{name} = {code}" for code, name in codes.items())
    dtype = f"{op.outputs[0].name}_dtype"
    lines = [first, *others]
    if op.op.launch is None:
        more, tensors = _operands(op, dtype, op.forward)
        lines += [*more, f"{_names(op.found)} = kernels.forward({_call(op, op.forward, tensors)})"]
    else:
        keep = "keep" if op.keeps else "False"
        arguments = f"make(Arguments, ({_names(op.arguments)},))"
        lines.append(f"{_names(op.found)} = {_part(op.op.launch)}(op, kernels, {arguments}, {dtype}, {keep})")
    for o in op.found:
        name = codes[_dtype(op, o)]
        lines.append(f"if {o.name}.dtype is not {name}:\n    {o.name} = {o.name}.to({name})")
    return lines


def _native(op: Declared, keep: str) -> str:
    """Returns the shortest path's call, on the arguments as they are."""
    if callable(op.op.fast):
        return f"{_part(op.op.fast)}(kernels, {keep}, {_names(op.arguments)})"
    return f"kernels.forward({_call(op, op.forward, {'keep': keep})})"


def _node_forward(op: Declared) -> list[str]:
    found, keeping = _names(op.found), ", True" * bool(op.keeps)
    checked = f"{found} = run_kernels(kernels, {_names(op.arguments)}{keeping})"
    if op.op.fast is False:
        return [checked]
    return [f"if direct:\n    {found} = {_native(op, 'True')}\nelse:\n    {checked}"]


def _differentiate(op: Declared, grads: list[str]) -> list[str]:
    found = [f"d_{a.name}" for a in op.differentiable]
    lines = ["needs = make(Arguments, needs)"] * op.asks
    if op.op.gradients is not None:
        needs = "needs" if op.asks else "None"
        lines.append(f"{_tuple(found)} = {_part(op.op.gradients)}(op, kernels, grads, saved, {needs})")
    else:
        more, tensors = _operands(op, _dtype(op, op.outputs[0]), op.backward, op.unread)
        read = "\n".join([*more, *_backward_call(op, _call(op, op.backward, tensors))])
        names = "|".join((*op.saves, *(a.name for a in op.options)))
        lines += [f"{', '.join(grads)}, = grads", re.sub(rf"(?<![\w.])({names})\b", r"saved.\1", read)]
        wanted = [a.name for a in op.differentiable] if op.asks else ()
        lines += [f"if not needs.{name}:\n    d_{name} = None" for name in wanted]
    return lines + [_back(a) for a in op.differentiable]


def _back(a: Argument) -> str:
    """Casts a gradient to the dtype of its tensor, and to its shape where several shapes are allowed."""
    several = len(a.pattern.alternatives) > 1 or a.pattern.alternatives[0].rest == "..."
    return f"d_{a.name} = back{'_in_shape' * several}(d_{a.name}, saved.{a.name})"


def _backward_call(op: Declared, arguments: str) -> Iterator[str]:
    """Returns the backward call. ``x=y`` among the results is the gradient of both."""
    results = [name.split("=") for name in op.backward_results]
    targets = ", ".join("_" if first == "_" else f"d_{first}" for first, *_ in results)
    yield f"{targets} = kernels.backward({arguments})"
    yield from (f"d_{name} = d_{first}" for first, *others in results for name in others)


def _for_autograd(op: Declared) -> str:
    return ", ".join(f"d_{a.name}" if a in op.differentiable else "None" for a in op.arguments)


def _native_backward(op: Declared, grads: list[str]) -> list[str]:
    if op.asks or op.op.fast is False:
        return []
    grads = [name for name in grads if name in op.backward]
    tensors = {name: _operand(op, name, "None") for name in grads}
    call = _backward_call(op, _call(op, op.backward, tensors))
    given = ", ".join(
        "None"
        if a not in op.differentiable
        else f"None if {a.name} is None else " * a.optional + f"d_{a.name}"
        for a in op.arguments
    )
    lines = "\n".join((*call, f"return None, None, {given}"))
    apart = {o.flag for o in op.graded if o.flag and f"grad_{o.name}" not in op.backward}
    batched = [f"{name} is not None and is_batched({name})" for name in grads]
    others = " or ".join((*apart, TRANSFORMED, *batched))
    return [f"if direct and not ({others}):", indent(lines, "    ")]


def _no_grads(op: Declared, grads: list[str]) -> list[str]:
    if op.materialize:
        return []
    return [f"if {' is None and '.join(grads)} is None:\n    return (None,) * {len(op.arguments) + 2}"]


def _constants(op: Declared) -> list[str]:
    """Returns the constants of the direct path, where outputs that are not asked for do not exist."""
    found = [o for o in op.outputs if o.constant]
    mark = f"ctx.mark_non_differentiable({_names(found)})"
    return [f"if {found[0].flag}:\n    {mark}" if found[0].flag else mark] if found else []


# --------------------------------------------------------------------------- the public function
def _shortest_path(op: Declared) -> str:
    if op.op.fast is False:
        return ""
    fragments = {
        "conditions": "\nand ".join(_conditions(op)),
        "apply_direct": _apply(op, True),
        "results": _results(op),
        "native": _native(op, "False"),
        "selected": _selected(op),
        "names": _names(op.arguments),
    }
    return _render(templates.SHORTEST_PATH, fragments)


def _conditions(op: Declared) -> Iterator[str]:
    """Returns the conditions of the shortest path: plain CPU tensors, exact options. The kernels check the rest."""
    yield "kernels is not None"
    fast = callable(op.op.fast)
    others = [a for a in op.tensors if a is not op.leader]
    # Kernels check dtypes, and the dispatcher devices. A function may call another product first, which checks nothing.
    told = op.deciding if op.one_work_dtype else () if fast else op.one_dtype
    compared = [a for a in others if a.name not in told and a.kind in ("constant", "floating")]
    # The other path takes calls whose arguments it must convert: declining inside the kernels costs 20 us more.
    wide = [op.leader.name] if op.outputs[0].wide else op.wide[:1]
    taken = {"": "{0}.is_contiguous()", "channels": "({0}.is_contiguous() or {0}.stride(-1) == 1)"}
    layout = op.layout(op.leader.name)
    dense = layout in taken and (op.outputs[0].wide or not fast)
    for a in (op.leader, *others):
        parts = [f"type({a.name}) in PLAIN"]
        parts += [f"{a.name}.is_cpu"] * (a is op.leader or fast)
        # Reading an attribute costs 40 ns, a local variable 1 ns.
        parts += [f"(dtype := {a.name}.dtype)"] * (a is op.leader and bool(compared))
        parts += [f"{a.name}.dtype is dtype"] * (a in compared)
        parts += [f"{a.name}.dtype in COMPUTE"] * (a.name in wide)
        parts += [taken[layout].format(a.name)] if a is op.leader and dense else []
        parts += [f"not {a.name}.requires_grad"] * (a.kind == "constant")
        yield _optional(a, " and ".join(parts))
    for a in op.options:
        condition = f" and ({a.condition})" if a.constraint and not a.dimension_of else ""
        # Kernels that get no dimension know only the default one.
        condition += f" and {a.name} == {a.default!r}" * bool(a.dimension_of and not fast)
        yield _optional(a, _right_type(a) + condition)
    yield from ['not is_autocast_enabled("cpu")'] * (op.autocast is not None)
    yield "not is_dynamo_compiling()"  # exports that trace without dynamo have no plain tensors
    yield f"not ({TRANSFORMED})"  # behind the former, because dynamo knows transforms by itself


def _formula_under_autocast(op: Declared) -> list[str]:
    """Serves only operands that have autocast's dtype already, because eager casts only some of its steps."""
    if op.autocast != "formula":
        return []
    differs = " or ".join(f"{name}.dtype is not cast_dtype" for name in op.one_dtype)
    return [
        f"cast_dtype = autocast_dtype({op.leader.name})",
        f"if cast_dtype is not None and ({differs}):\n    return {_formula(op)}",
    ]


def _cast(op: Declared) -> list[str]:
    rule = op.autocast
    if rule in (None, "formula"):
        return []
    if callable(rule):
        names = _tuple([a.name for a in op.arguments])
        line = f"{names} = {_part(rule)}(op, cast_dtype, make(Arguments, ({_names(op.arguments)},)))"
    else:
        line = f"{_tuple(_cast_names(op))} = cast(cast_dtype, {', '.join(_cast_names(op))})"
    return [
        f"cast_dtype = autocast_dtype({op.leader.name})",
        "if cast_dtype is not None:",
        f"    {line}",
        f"    kernels = family.kernels({', '.join(op.deciding)})",
        "    if kernels is None:",
        f"        return {_formula(op)}",
    ]


def _cast_names(op: Declared) -> list[str]:
    return op.one_dtype if op.autocast == "one dtype" else op.autocast.split()


# --------------------------------------------------------------------------- registration
def _written(op: Declared) -> Iterator[str]:
    """Returns the fields of ``Written`` that have no default, or another value."""
    rule = op.autocast
    same = ["Arguments", "check", "run_kernels", "fake", "result_dtypes"]
    same += ["Saved", "apply", "differentiate"] * bool(op.differentiable)
    values = {
        "results": tuple(o.name for o in op.found),
        "deciding": tuple(op.deciding),
        "strided": tuple(o.name for o in op.found if o.name in op.strides),
        "differentiable": tuple(a.name for a in op.differentiable),
        "graded": {o.name: o.flag for o in op.graded},
        "saves": tuple(op.saves) if op.differentiable else (),
        "kept": tuple(o.name for o in op.keeps),
        "released": tuple(op.unread),
    }
    flags = {"dense": not all(map(op.like, op.outputs)), "materialize": op.materialize, "asks": op.asks}
    yield from (f"{name}={name}," for name in same)
    yield from (f"{name}={value!r}," for name, value in values.items() if value)
    yield from (f"{name}={value}," for name, value in flags.items() if value is (name == "asks"))
    if rule is not None:
        yield f"autocast={_part(rule) if callable(rule) else () if rule == 'formula' else tuple(_cast_names(op))},"


def _schemas(op: Declared) -> list[str]:
    tensors = {a.name: f"Tensor{'?' * a.optional} {a.name}" for a in op.tensors}
    saved = [tensors.get(name, f"Tensor {name}") for name in op.saves]
    grads = [f"Tensor{'?' * (len(op.graded) > 1)} grad_{o.name}" for o in op.graded]
    options = [a.schema.partition("=")[0] for a in op.options]
    backward = [*grads, *saved, *options, *["bool[] needs"] * op.asks]
    forward = [*(a.schema for a in op.arguments), *["bool keep=False"] * bool(op.keeps)]
    found = [schema(op.name, forward, len(op.found))]
    found += [schema(f"{op.name}_backward", backward, len(op.differentiable))] * bool(op.differentiable)
    return ["\n".join(map(repr, lines)) + "," for lines in found]


def schema(name: str, arguments: list[str], count: int) -> list[str]:
    """Returns the lines of an operator's schema."""
    text = f"{name}({', '.join(arguments)}) -> {_returned(count).replace('tuple[', '(').replace(']', ')')}"
    lines = textwrap.wrap(text, 100, break_on_hyphens=False)
    return [*(f"{line} " for line in lines[:-1]), lines[-1]]


def parts(op: Declared) -> set[str]:
    """Returns the names of the functions that the declaration gives."""
    values = [*vars(op.op).values(), *op.sizes.values(), *op.strides.values(), *(o.pattern for o in op.found)]
    own = {id(op.op.definition), id(vars(op.op).get("function"))}
    return {v.__name__ for v in values if inspect.isfunction(v) and id(v) not in own}
