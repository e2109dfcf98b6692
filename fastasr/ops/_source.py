# SPDX-License-Identifier: Apache-2.0
"""Generates Python source from a declaration, with each name of the signature written out, so a call costs no loop.

``print(ops.bypass.op.source)`` shows one. Names with an underscore are the engine's, see ``Op._namespace``; those in
braces are fragments that the functions below the template write.
"""

import re
from collections.abc import Iterable, Iterator
from textwrap import indent

import torch

from fastasr.ops._signature import TENSORS

FORWARD = """
def _check({names}):
    {checks}


# ---------------------------------------------------------------- the registered operator
def _run({operator_parameters}):
    _kernels = _family.kernels({deciding})
    if _kernels is None:
        return _formula_results(_op, _Arguments({names}))
    try:
        {found} = _run_kernels(_kernels, {names}{keep})
    except _Unlaunchable as _error:
        _family.give_up(_error, {deciding})
        return _formula_results(_op, _Arguments({names}))
    {drop}
    return {dense_found}


def _run_kernels(_kernels, {names}{keep}):
    {launch}
    return {found}


def _fake({operator_parameters}):
    {sizes}
    return {empty}


# ---------------------------------------------------------------- the public function
def {name}({parameters}):
    {known_by_torch}
    _kernels = _family.native
    if (
        {fast}
    ):
        try:
            {by_torch}
            {apply_direct}
            {results} = {native}
            return {selected}
        except RuntimeError as _error:
            if not _declined(_error):
                _check({names})  # tells what is wrong with the arguments, if anything is
                raise
    _check({names})
    {formula_under_autocast}
    if _is_compiling() or not ({plain}):
        return _traced({names})
    if {transformed}:
        return _by_formula(_op, _make(_Arguments, ({names},)))
    _kernels = _family.kernels({deciding})
    if _kernels is None:
        return {definition}
    {cast}
    try:
        {apply}
        {results} = _run_kernels(_kernels, {names}{not_keeping})
    except _Unlaunchable as _error:
        _family.give_up(_error, {deciding})
        return {definition}
    return {selected}


def _traced({names}):
    if not _served("{family}", {deciding}):
        return {definition}
    {results} = _op.operator({names}{keep_if_wanted})
    return {selected}
"""

BACKWARD = """
def _set_up(ctx, inputs, output):
    {names}{keep}, = inputs
    {found} = output
    {not_differentiable}
    {materialize}
    {stand_ins}
    ctx.save_for_backward({saves})
    {remember}


def _backward(ctx, {grads}, *_):
    {no_grads}
    {saves}, = ctx.saved_tensors
    {operator_rest}
    {compute_again}
    {flags}
    {asked_by_dispatcher}
    {gradients}, = _as_tuple(_op.backward_operator({grads}, {saved}{needs}))
    return {for_the_operator}


def _run_backward({grads}, {saved}{needs}):
    _kernels = _family.kernels({deciding})
    if _kernels is None:
        {gradients}, = _formula_gradients(_op, ({grads},), _make(_Saved, ({saved},)))
    else:
        try:
            {gradients}, = _differentiate(_kernels, {grads}, {saved}{needs})
        except _Unlaunchable as _error:
            {gradients}, = _gradients_without(_error, _op, ({grads},), _make(_Saved, ({saved},)))
        {apart}
    return {dense_gradients}


def _fake_backward({grads}, {saved}{needs}):
    return {empty_gradients}


def _differentiate(_kernels, {grads}, {saved}{needs}):
    {differentiate}
    return {gradients},


# ---------------------------------------------------------------- without the dispatcher
class {class_name}(_Function):
    @staticmethod
    def forward(ctx, _kernels, _direct, {names}):
        if _direct:
            {found} = {native_keeping}
        else:
            {found} = _run_kernels(_kernels, {names}{keeping})
        ctx.save_for_backward({saves_directly})
        ctx.rest = _kernels, _direct, {options_and_likes}
        {materialize}
        {constants}
        return {selected}

    @staticmethod
    def backward(ctx, {optional_grads}, *_):
        if _is_grad_enabled():
            _refuse_double_backward("{name}")
        {saves_directly}, = ctx.saved_tensors  # once: a checkpoint gives them one time
        _kernels, _direct, {options_and_unread} = ctx.rest
        {likes}
        {no_grads_directly}
        {under_transforms}
        {native_backward}
        {asked}
        try:
            {gradients}, = _differentiate(_kernels, {grads}, {saved}{asked_by_autograd})
        except _Unlaunchable as _error:
            {gradients}, = _gradients_without(_error, _op, ({grads},), _make(_Saved, ({saved},)))
        return None, None, {for_autograd}
"""

TRANSFORMED = "_transforms_active() or _forward_ad._current_level >= 0"  # _transforms.is_transformed()


def write(op) -> str:
    found = (*op.outputs, *op.keeps)
    grads = [f"grad_{o.name}" for o in op.graded]
    rest = ", ".join((*(a.name for a in op.options), *["keep"] * bool(op.keeps)))
    fragments = {
        "name": op.name,
        "class_name": op.class_name,
        "family": op.family.name,
        "names": _names(op.arguments),
        "parameters": _parameters(op),
        "operator_parameters": ", ".join(
            (*map(_parameter, op.arguments), *(["keep=False"] * bool(op.keeps)))
        ),
        "deciding": ", ".join(op.deciding),
        "options_and_likes": ", ".join(
            (*(a.name for a in op.options), *(f"({name}.shape, {name}.dtype)" for name in op.unread))
        ),
        "likes": [f"{name} = _make(_Like, {name})" for name in op.unread],
        "options_and_unread": ", ".join((*(a.name for a in op.options), *op.unread)),
        "saves": ", ".join(op.saves),
        "saves_directly": ", ".join(name for name in op.saves if name not in op.unread),
        "saved": ", ".join((*op.saves, *(a.name for a in op.options))),
        "found": _names(found),
        "dense_found": ", ".join(o.name + ".contiguous()" * (not op.like and not op.empty) for o in found),
        "results": ", ".join((*(o.name for o in op.outputs), *("_" for _ in op.keeps))),
        "selected": _selected(op),
        "grads": ", ".join(grads),
        "optional_grads": ", ".join(
            g + "=None" * bool(o.flag) for g, o in zip(grads, op.graded, strict=True)
        ),
        "gradients": ", ".join(f"_d_{a.name}" for a in op.differentiable),
        "keep": ", keep" * bool(op.keeps),
        "keeping": ", True" * bool(op.keeps),
        "not_keeping": ", False" * bool(op.keeps),
        "keep_if_wanted": f", {_wanted(op)}" * bool(op.keeps),
        "needs": ", _needs" * op.asks,
        "asked": ["_asked = ctx.needs_input_grad"] * op.asks,
        "asked_by_autograd": f", {_needed(op)}" * op.asks,
        "asked_by_dispatcher": ["_needs = _op.needed(ctx.needs_input_grad)"] * op.asks,
        "materialize": ["ctx.set_materialize_grads(False)"] * (not op.materialize),
        "no_grads": _no_grads(op, grads, len(op.arguments) + bool(op.keeps)),
        "no_grads_directly": _no_grads(op, grads, len(op.arguments) + 2),
        "checks": _checks(op),
        "launch": _launch(op),
        "drop": [f"if not keep:\n    {o.name} = {o.name}.new_empty(0)" for o in op.keeps],
        "sizes": _sizes(op),
        "empty": ", ".join(_empty(op, o) for o in found),
        "not_differentiable": _not_differentiable(op),
        "constants": _constants(op),
        "stand_ins": _stand_ins(op),
        "remember": [f"ctx.rest = {rest},"] * bool(rest),
        "operator_rest": [f"{rest}, = ctx.rest"] * bool(rest),
        "compute_again": [
            f"if not keep:\n    {', '.join('_' for _ in op.outputs)}, {_names(op.keeps)} = "
            f"_op.operator({_names(op.arguments)}, True)"
        ]
        * bool(op.keeps),
        "flags": [f"grad_{o.name} = grad_{o.name} if {o.flag} else None" for o in op.graded if o.flag],
        "for_the_operator": _for_the_operator(op),
        "dense_gradients": _each_gradient(
            op, "_d_{0}" if op.like else "_d_{0}.contiguous()", " or _d_{0} is None"
        ),
        "apart": [
            f"_d_{name} = _d_{name}.clone()" for token in op.backward_results for name in token.split("=")[1:]
        ],
        "empty_gradients": _each_gradient(op, "_empty_like({0})" if op.like else "{0}.new_empty({0}.shape)"),
        "differentiate": _differentiate(op, grads),
        "transformed": TRANSFORMED,
        "under_transforms": _under_transforms(op, grads),
        "native": _native(op, "False"),
        "native_keeping": _native(op, "True"),
        "native_backward": _native_backward(op, grads),
        "for_autograd": _for_autograd(op),
        # Python leaves the branch of a condition "False" out
        "fast": [op.fits if op.fits == "False" else "\nand ".join(_fast(op))],
        "known_by_torch": _known_by_torch(op),
        "by_torch": _by_torch(op),
        "apply_direct": _apply(op, True),
        "apply": _apply(op, False),
        "plain": " and ".join(_optional(a, f"type({a.name}) in _PLAIN") for a in op.tensors),
        "definition": _definition(op),
        "cast": _cast(op),
        "formula_under_autocast": _formula_under_autocast(op),
    }
    return _render(FORWARD, fragments) + _render(BACKWARD, fragments) * bool(op.differentiable)


def _render(template: str, fragments: dict) -> str:
    """Puts fragments that are texts into their lines; fragments that are lists of lines stand alone on theirs."""
    lines = []
    for line in template.strip("\n").split("\n"):
        alone = re.fullmatch(r"( +)\{(\w+)\}", line)
        if alone:
            lines += (
                indent("\n".join(fragments[alone[2]]), alone[1]).split("\n") if fragments[alone[2]] else []
            )
        else:
            lines.append(line.format_map(fragments))
    return "\n".join(lines) + "\n\n\n"


# --------------------------------------------------------------------------- names
def _names(named) -> str:
    return ", ".join(a.name for a in named)


def _parameter(a) -> str:
    return a.name if a.required else f"{a.name}={a.default!r}"


def _parameters(op) -> str:
    parts, keywords = [_parameter(a) for a in op.arguments], [a.keyword_only for a in op.arguments]
    if any(keywords):
        parts.insert(keywords.index(True), "*")
    return ", ".join(parts)


def _selected(op) -> str:
    everything, flag = _names(op.outputs), op.outputs[-1].flag
    return (
        f"({everything}) if {flag} else {_names(o for o in op.outputs if not o.flag)}" if flag else everything
    )


def _definition(op) -> str:
    return (
        f"_definition({', '.join(f'{a.name}={a.name}' if a.keyword_only else a.name for a in op.arguments)})"
    )


def _wanted(op) -> str:
    wanted = (
        f"{a.name} is not None and " * a.optional + f"{a.name}.requires_grad" for a in op.differentiable
    )
    return f"_is_grad_enabled() and ({' or '.join(wanted)})"


def _known_by_torch(op) -> list[str]:
    """Returns torch's call where an equal one was checked before: the checks cost as much as a small product."""
    if op.by_torch is None:
        return []
    call, key, fits, _ = op.by_torch
    return [
        "_call = _wins = None",
        "try:",
        f"    if not _is_dynamo_compiling() and type({op.leader.name}) in _PLAIN:",
        f"        _call = {key}",
        "        _wins = _family.chosen.get(_call)",
        f"        if _wins and {fits}:",
        f"            return {call}",
        "except (AttributeError, RuntimeError, TypeError):",
        "    pass  # the checks tell what is wrong",
    ]


def _by_torch(op) -> list[str]:
    if op.by_torch is None:
        return []
    call, _, _, decide = op.by_torch
    return [f"if _wins is None and {decide}:\n    return {call}"]


def _apply(op, direct: bool) -> list[str]:
    call = f"return _apply(_kernels, {direct}, {_names(op.arguments)})"
    return [f"if {_wanted(op)}:\n    {call}"] * bool(op.differentiable)


def _needed(op) -> str:
    """Returns autograd's answer for each floating tensor; the function's first two arguments are the engine's."""
    return f"({', '.join(f'_asked[{2 + place}]' for place in op.places)},)"


def _optional(a, condition: str) -> str:
    return f"({a.name} is None or {condition})" if a.optional else condition


def _if_given(a, lines: Iterable[str], otherwise: Iterable[str] = ()) -> Iterator[str]:
    """Returns the lines; those of an optional argument run only where it is given."""
    lines, otherwise = "\n".join(lines), "\n".join(otherwise)
    if not a.optional or not lines:
        yield from lines.split("\n") if lines else ()
        return
    yield f"if {a.name} is not None:\n{indent(lines, '    ')}"
    if otherwise:
        yield f"else:\n{indent(otherwise, '    ')}"


# --------------------------------------------------------------------------- checks
def _checks(op) -> list[str]:
    lines = [line for a in op.options if not a.dimension_of for line in _if_given(a, _option(a))]
    known = op.known_sizes()
    for a in op.in_binding_order():
        before = set(known)
        body = [*_tensor(op, a, known)]
        lines += _if_given(a, body, (f"{name} = 0" for name in sorted(known - before)))
        lines += _given_sizes(op) if a is op.leader else ()
    lines += [line for a in op.options if a.dimension_of for line in _if_given(a, _option(a))]
    for name, partner in op.needs.items():
        wrong = f'_op.wrong_company("{name}", "{partner}")'
        lines.append(f"if {partner} is None and not ({_absent(op, name)}):\n    {wrong}")
    lines += _one_dtype(op)
    return lines + [f"_part_check(_op, _Arguments({_names(op.arguments)}))"] * (op.check is not None)


def _option(a) -> Iterator[str]:
    yield f'if not ({_right_type(a)}):\n    _op.wrong_option("{a.name}", {a.name})'
    if a.dimension_of:
        yield f'if not ({a.condition}):\n    _op.wrong_dimension("{a.name}", {a.name}, {a.dimension_of})'
    elif a.constraint:
        yield f'if not ({a.condition}):\n    _op.fail("{a.name}", "{a.expected}", {a.name})'


def _right_type(a) -> str:
    more = f" and {a.name} in _codes_{a.name}" if a.codes else ""
    if a.kind == "pair":
        more = f" and len({a.name}) == 2 and type({a.name}[0]) is type({a.name}[1]) is int"
    return f"type({a.name}) is {a.type_name}{more}"


def _given_sizes(op) -> list[str]:
    arguments = f"_Arguments({_names(op.arguments)})"
    return [f"{', '.join(names.split())}, = _sizes_{i}({arguments})" for i, names in enumerate(op.sizes)]


def _tensor(op, a, known: set[str]) -> Iterator[str]:
    name, leader = a.name, op.leader.name
    dtypes, _ = TENSORS[a.kind]
    yield f"if not isinstance({name}, _Tensor) or {name}.dtype not in _{dtypes} or {name}.layout is not _strided:"
    yield f'    _op.wrong_tensor("{name}", {name})'
    if a.kind == "constant":
        yield f'if {name}.requires_grad:\n    _op.fail("{name}", "a constant", "a tensor that requires a gradient")'
    sizes = ", ".join(f'"{size}": {size}' for size in sorted(known & a.pattern.mentioned))
    yield from a.pattern.check(known, name, f'_op.wrong_shape("{name}", {name}, {{{sizes}}})')
    if name != leader:
        yield f'if {name}.device != {leader}.device:\n    _op.wrong_device("{name}", {name}, {leader})'


def _absent(op, name: str) -> str:
    a = op.argument(name)
    return f"{name} is None" if a.optional else f"{name} == {a.default!r}"


def _one_dtype(op) -> Iterator[str]:
    lines = []
    for name in op.one_dtype[1:]:
        first = op.one_dtype[0]
        wrong = f'if {name}.dtype != {first}.dtype:\n    _op.wrong_dtype("{name}", {name}, {first})'
        lines += _if_given(op.argument(name), [wrong])
    if lines and op.cast is not None:
        lines = [f"if _autocast_dtype({op.one_dtype[0]}) is None:", indent("\n".join(lines), "    ")]
    yield from lines


# --------------------------------------------------------------------------- results without numbers
def _sizes(op) -> list[str]:
    lines, known = [], op.known_sizes()
    if op.keeps:  # the formula keeps nothing
        lines.append(f"keep = keep and _family.kernels({', '.join(op.deciding)}) is not None")
    for a in op.in_binding_order():
        before = set(known)
        bound = list(a.pattern.bind(known, a.name))
        lines += _if_given(a, bound, (f"{name} = 0" for name in sorted(known - before)))
        lines += _given_sizes(op) if a is op.leader else ()
    return lines


def _empty(op, output) -> str:
    asked = output.flag or ("keep" if output in op.keeps else "")
    if op.like and not asked:
        return f"_empty_like({op.like}, dtype={_dtype(op, output)})"
    if callable(output.pattern):
        backend = f"_family.kernels({', '.join(op.deciding)}).backend"
        shape = f"_shape_{output.name}({backend}, _Arguments({_names(op.arguments)}))"
    else:
        shape = output.pattern.alternatives[0].tuple_code()
    shape += f" if {asked} else (0,)" * bool(asked)
    empty = "_empty"
    if op.empty and not asked:
        empty = f"(_empty if _family.kernels({', '.join(op.deciding)}) is None else _empty_output)"
    return f"{empty}({shape}, dtype={_dtype(op, output)}, device={op.leader.name}.device)"


def _dtype(op, output) -> str:
    if isinstance(output.dtype, torch.dtype):
        return str(output.dtype).replace("torch.", "_")
    return f"{'_wide' if output.wide else '_promoted'}({', '.join(op.dtype_names(output))})"


# --------------------------------------------------------------------------- kernels
def _arguments(op, tokens: list[str], renamed: dict[str, str] | None = None) -> str:
    """Returns a kernel's arguments: choices as their codes, no number as 0, renamed ones, and the rest unchanged."""
    names = {a.name: f"_codes_{a.name}[{a.name}]" for a in op.options if a.codes}
    names |= {a.name: f"{a.name} or 0" for a in op.options if a.kind == "int" and a.optional}
    names |= renamed or {}
    return ", ".join(names.get(token, token) for token in tokens)


def _layout(op, name: str, grad: bool) -> str:
    return op.strides.get(name) or (grad and op.strides.get("grad")) or "contiguous"


def _grad_operands(op, grads: list[str]) -> dict[str, str]:
    """Returns the outputs' gradients as kernels read them."""
    optional = {f"grad_{o.name}" for o in op.outputs if o.flag}
    layouts = {name: _layout(op, name, True) for name in grads}
    return {
        name: f"_operand({name}, None, _{layout})"
        if name in optional or layout != "contiguous"
        else f"{name}.contiguous()"
        for name, layout in layouts.items()
    }


def _operands(op, dtype: str, grads: Iterable[str] = ()) -> Iterator[str]:
    """Returns ``_o_<name>``: each tensor as the kernels read it."""
    wide = [*op.wide, *(f"grad_{o.name}" for o in op.outputs if o.wide and op.wide)]
    if op.decides:
        first, *others = op.deciding
        dtype = "_dtype"
        yield f"_dtype = _widest({first}, ({', '.join(others)},))"
    else:
        yield f'_dtype = {dtype} if _kernels.backend == "cpu" else None'
    if op.wide:
        yield f"_work = _promote_types({dtype}, _float32)"
    for name in (*grads, *(a.name for a in op.tensors if not (grads and a.name in op.unread))):
        floating = name in grads or (op.argument(name).kind == "floating" and name not in op.own_dtype)
        to = "_work" if name in wide else "_dtype" if floating else None
        yield f"_o_{name} = _operand({name}, {to}, _{_layout(op, name, name in grads)})"


def _launch(op) -> list[str]:
    found = (*op.outputs, *op.keeps)
    codes = {code: f"_dtype_{i}" for i, code in enumerate(dict.fromkeys(_dtype(op, o) for o in found))}
    lines = [f"{name} = {code}" for code, name in codes.items()]
    if op.launch is None:
        lines += _operands(op, "_dtype_0")
        call = _arguments(op, op.forward, {a.name: f"_o_{a.name}" for a in op.tensors})
        lines.append(f"{_names(found)} = _kernels.forward({call})")
    else:
        arguments = f"_make(_Arguments, ({_names(op.arguments)},))"
        part = f"_launch(_op, _kernels, {arguments}, _dtype_0, {'keep' if op.keeps else False})"
        lines.append(f"{_names(found)} = {part}")
    for o in found:
        dtype = codes[_dtype(op, o)]
        lines.append(f"if {o.name}.dtype is not {dtype}:\n    {o.name} = {o.name}.to({dtype})")
    return lines


def _native(op, keep: str) -> str:
    """Returns the shortest path's call, on the arguments as they are."""
    if isinstance(op.fast, str) and op.fast:
        return re.sub(r"\bkeep\b", keep, op.fast)
    if op.fast:
        return f"_fast(_kernels, {keep}, {_names(op.arguments)})"
    return f"_kernels.forward({_arguments(op, op.forward, {'keep': keep})})"


def _differentiate(op, grads: list[str]) -> list[str]:
    found = [f"_d_{a.name}" for a in op.differentiable]
    saved = f"_make(_Saved, ({', '.join((*op.saves, *(a.name for a in op.options)))},))"
    if op.gradients is None:
        used = [token for token in op.backward if token in grads]
        lines = ["needs = _make(_Needs, _needs)"] * op.asks
        lines += _operands(op, _dtype(op, op.outputs[0]), used)
        call = _arguments(op, op.backward, {n: f"_o_{n}" for n in (*used, *(a.name for a in op.tensors))})
        lines += [*_backward_call(op, call), *_add_flagged(op)]
        names = [a.name for a in op.differentiable] if op.asks else ()
        lines += [f"if not needs.{name}:\n    _d_{name} = None" for name in names]
    else:
        needs = "_make(_Needs, _needs)" if op.asks else None
        lines = [f"{', '.join(found)}, = _gradients(_op, _kernels, ({', '.join(grads)},), {saved}, {needs})"]
    return lines + [_back(d, a) for d, a in zip(found, op.differentiable, strict=True)]


def _back(gradient: str, a) -> str:
    """Casts a gradient to the dtype of its tensor, and to its shape where several shapes are allowed."""
    if len(a.pattern.alternatives) > 1 or a.pattern.alternatives[0].rest == "...":
        return f"{gradient} = _back({gradient}, {a.name})"
    differs = f"{gradient} is not None and {gradient}.dtype is not {a.name}.dtype"
    cast = f"if {differs}:\n    {gradient} = {gradient}.to({a.name}.dtype)"
    return f"if {a.name} is None:\n    {gradient} = None\nel{cast}" if a.optional else cast


def _backward_call(op, arguments: str) -> Iterator[str]:
    """Returns the backward call. ``x=y`` among the results is the gradient of both."""
    results = [name.split("=") for name in op.backward_results]
    targets = ", ".join("_" if first == "_" else f"_d_{first}" for first, *_ in results)
    yield f"{targets} = _kernels.backward({arguments})"
    yield from (f"_d_{name} = _d_{first}" for first, *others in results for name in others)


def _add_flagged(op) -> list[str]:
    if op.flagged is None:
        return []
    flags, found = [o for o in op.outputs if o.flag], ", ".join(f"_d_{a.name}" for a in op.differentiable)
    saved = f"_make(_Saved, ({', '.join((*op.saves, *(a.name for a in op.options)))},))"
    grads = ", ".join(f"grad_{o.name}" for o in flags)
    return [f"if {flags[0].flag}:\n    _flagged(_op, ({grads},), ({found},), {saved})"]


def _under_transforms(op, grads: list[str]) -> list[str]:
    """Serves gradients under a transform that began after the forward pass."""
    if op.unread:
        return [f'_refuse_unless_batched("{op.name}")']
    saved = f"_make(_Saved, ({', '.join((*op.saves, *(a.name for a in op.options)))},))"
    found, given = [f"_d_{a.name}" for a in op.differentiable], _for_autograd(op)
    batched = " or ".join(
        f"{grad} is not None and _is_batched({grad})"
        if o.flag or not op.materialize
        else f"_is_batched({grad})"
        for grad, o in zip(grads, op.graded, strict=True)
    )
    return [
        f"if {TRANSFORMED} or {batched}:",
        f"    {', '.join(found)}, = _transformed_gradients(_op, ({', '.join(grads)},), {saved})",
        f"    return None, None, {given}",
    ]


def _for_autograd(op) -> str:
    return ", ".join(f"_d_{a.name}" if a in op.differentiable else "None" for a in op.arguments)


def _native_backward(op, grads: list[str]) -> list[str]:
    if op.asks:
        return []
    call = _backward_call(op, _arguments(op, op.backward, _grad_operands(op, grads)))
    given = ", ".join(
        "None"
        if a not in op.differentiable
        else f"None if {a.name} is None else " * a.optional + f"_d_{a.name}"
        for a in op.arguments
    )
    return [
        "if _direct:",
        indent("\n".join((*call, *_add_flagged(op), f"return None, None, {given}")), "    "),
    ]


# --------------------------------------------------------------------------- gradients of the operator
def _no_grads(op, grads: list[str], count: int) -> list[str]:
    return (
        [] if op.materialize else [f"if {' is None and '.join(grads)} is None:\n    return (None,) * {count}"]
    )


def _constants(op) -> list[str]:
    """Returns the constants of the direct path, where outputs that are not asked for do not exist."""
    found = [o for o in op.outputs if o.constant]
    mark = f"ctx.mark_non_differentiable({_names(found)})"
    return [f"if {found[0].flag}:\n    {mark}" if found[0].flag else mark] if found else []


def _stand_ins(op) -> list[str]:
    lines = [f"{name} = _stand_in({name})" for name in op.unread]
    served = f"keep and _family.kernels({', '.join(op.deciding)}) is not None"
    return [f"if {served}:", *(f"    {line}" for line in lines)] if lines else []


def _not_differentiable(op) -> list[str]:
    flags = [o for o in op.graded if o.flag]
    always = [o for o in (*op.outputs, *op.keeps) if o.constant or o in op.keeps]
    always = [f"ctx.mark_non_differentiable({_names(always)})"] * bool(always)
    absent = (
        [f"if not {flags[0].flag}:\n    ctx.mark_non_differentiable({_names((*flags, *op.keeps))})"]
        if flags
        else []
    )
    return always + absent


def _gone(op, more: str = "") -> dict[str, str]:
    """Says for each gradient when the operator gives a tensor without elements."""
    return {
        a.name: " or ".join(
            [f"{a.name} is None"] * a.optional + [f"not _needs[{i}]{more.format(a.name)}"] * op.asks
        )
        for i, a in enumerate(op.differentiable)
    }


def _each_gradient(op, form: str, more: str = "") -> str:
    nothing = f"{op.leader.name}.new_empty(0)"
    return ", ".join(
        (f"{nothing} if {gone} else " if gone else "") + form.format(name)
        for name, gone in _gone(op, more).items()
    )


def _for_the_operator(op) -> str:
    gone = _gone(op)
    given = [
        (f"None if {gone[a.name]} else " if gone.get(a.name) else "") + f"_d_{a.name}"
        if a.name in gone
        else "None"
        for a in op.arguments
    ]
    return f"({', '.join(given + ['None'] * bool(op.keeps))},)"


# --------------------------------------------------------------------------- the public function
def _fast(op) -> Iterator[str]:
    """Returns the conditions of the shortest path: plain CPU tensors, exact options. The kernels check the rest."""
    yield "_kernels is not None"
    others = [a for a in op.tensors if a is not op.leader]
    # Kernels check dtypes, and the dispatcher devices. With ``fits`` another product comes first, which does not.
    unchecked = bool(op.fast and op.fits)
    told = op.deciding if op.decides else () if unchecked else op.one_dtype
    untold = [a for a in others if a.name not in (*told, *op.own_dtype)] if unchecked or not op.fast else []
    compared = [a for a in untold if a.kind in ("constant", "floating")]
    # What the other path converts for the kernels is left to it: their decline would cost it 20 us more.
    wide = [op.leader.name] if op.outputs[0].wide else op.wide[: not op.launch]
    taken = {"contiguous": "{0}.is_contiguous()", "channels": "({0}.is_contiguous() or {0}.stride(-1) == 1)"}
    layout = _layout(op, op.leader.name, False)
    converts = layout in taken and (op.outputs[0].wide or not (op.launch or op.fast))
    dense = op.fast_strides or [op.leader.name] * converts
    for a in (op.leader, *others):
        parts = [f"type({a.name}) in _PLAIN"]
        parts += [f"{a.name}.is_cpu"] * (a is op.leader or unchecked)
        # reading an attribute costs 40 ns, a local variable 1
        parts += [f"(_dtype := {a.name}.dtype)"] * (a is op.leader and bool(compared))
        parts += [f"{a.name}.dtype is _dtype"] * (a in compared)
        parts += [f"{a.name}.dtype in _COMPUTE"] * (a.name in wide)
        parts += [taken.get(layout, "").format(a.name)] * (a.name in dense)
        parts += [f"not {a.name}.requires_grad"] * (a.kind == "constant")
        yield _optional(a, " and ".join(parts))
    for a in op.options:
        condition = f" and ({a.condition})" if a.constraint and not a.dimension_of else ""
        yield _optional(a, _right_type(a) + condition)
    for name, partner in op.needs.items():
        if not op.argument(name).pattern:
            yield f"({partner} is not None or {_absent(op, name)})"
    if op.fits:
        yield op.fits if isinstance(op.fits, str) else f"_fits({_names(op.arguments)})"
    yield from ['not _is_autocast_enabled("cpu")'] * (op.cast is not None)
    yield "not _is_dynamo_compiling()"  # exports that trace without dynamo have no plain tensors
    yield f"not ({TRANSFORMED})"  # behind the former, because dynamo knows transforms by itself


def _formula_under_autocast(op) -> list[str]:
    """Serves only operands that have autocast's dtype already, because eager casts only some of its steps."""
    if op.autocast != "formula":
        return []
    differs = " or ".join(f"{name}.dtype is not _dtype" for name in op.one_dtype)
    return [
        f"_dtype = _autocast_dtype({op.leader.name})",
        f"if _dtype is not None and ({differs}):\n    return {_definition(op)}",
    ]


def _cast(op) -> list[str]:
    if op.cast is None or op.autocast == "formula":
        return []
    names = _names(op.arguments)
    return [
        f"_dtype = _autocast_dtype({op.leader.name})",
        "if _dtype is not None:",
        f"    _arguments = _cast(_op, _dtype, _Arguments({names}))",
        f"    _kernels = _family.kernels({', '.join(f'_arguments.{name}' for name in op.deciding)})",
        "    if _kernels is None:",
        f"        return {_definition(op)}",
        f"    {names}, = _arguments",
    ]
