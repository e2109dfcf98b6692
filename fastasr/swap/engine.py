# SPDX-License-Identifier: Apache-2.0
"""Defines accelerate, explain, restore, refresh and eager_mode, which walk a model, decide per module, and bind or
undo."""

import contextlib
import fnmatch
import weakref
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from fastasr.graphs import Graphs
from fastasr.graphs import module as recording
from fastasr.graphs.module import OnRow
from fastasr.models.common.plain import full_name, hooks_of
from fastasr.models.common.ragged import why_not_hooked
from fastasr.ops import _kept
from fastasr.ops._dispatch import why_eager
from fastasr.swap import binding
from fastasr.swap import weights as reduced
from fastasr.swap.reach import Reach
from fastasr.swap.report import REPLACED, ROLLED_BACK, SKIPPED, Restored, Row, SwapReport
from fastasr.swap.rule import Graphed, Known, Rule, upstream_class, upstream_forward
from fastasr.swap.rules import FAMILIES, returnn, rules_by_forward
from fastasr.swap.rules.torch import LINEAR
from fastasr.swap.source_hash import SourceUnavailable, fingerprint
from fastasr.swap.state import ModelState
from fastasr.swap.verify import verified as run_verification

# What ``only`` and ``exclude`` take: a class, names or paths, a function of path and module, or several of these.
Selection = str | type | Callable[..., Any] | Collection[Any] | None
Selected = Callable[[str, nn.Module], bool]
Plan = list[tuple[str, nn.Module, "Decision"]]


@dataclass
class Decision:
    """The decision for one module. ``rule`` is the rule for its class; ``apply`` says whether the module fits it.

    ``unknown_source`` marks a module that fits in structure but runs code of an unknown version; ``known`` is the
    version of its code. ``later`` is the decision for a rule that ``accelerate(ragged=True)`` binds at its end.
    """

    rule: Rule | None
    apply: bool
    reason: str
    unknown_source: bool = False
    known: Known | None = None
    later: "Decision | None" = None


# the frameworks that have rules, and packages with other names than their framework's rules
_FRAMEWORKS = {rule.name.partition(".")[0] for family in FAMILIES for rule in family}
_OTHER_NAMES = {"espnet2": "espnet", "whisper": "openai_whisper"}
_CONTAINER = "container: see its submodules"
_ALONE = "is replaced only beside other classes, which this model lacks"
_NO_RULE = "no rule for this class"
# why the calls of an encoder are not recorded that gets frames without padding
_RAGGED = "it runs without padding, in another shape at every call"
_ON_ROWS = "; Graphs(frames=..., recordings=...) gives it one shape"
# Swapped modules inside ``eager_mode``, and the functions that come back after it
_paused: weakref.WeakKeyDictionary[nn.Module, tuple[Any, Any]] = weakref.WeakKeyDictionary()


def accelerate(
    model: nn.Module,
    only: Selection = None,
    exclude: Selection = None,
    verify: Any = None,
    strict: bool = True,
    weights: str | None = None,
    weights_error: float = 0.05,
    ragged: bool = False,
    graphs: bool | Graphs = False,
) -> SwapReport:
    """Replaces the forward of every module that a rule recognises, in place. Returns a SwapReport.

    Parameters, buffers, submodules, hooks and types stay unchanged. A second call changes nothing.

    only, exclude: the modules to consider or to leave out: glob patterns on module paths ("encoder.*.norm"), classes,
        callables ``(path, module) -> bool``, or a list of these.
    verify: inputs (a tuple of arguments, a dict of keyword arguments, a tensor, or a callable that takes the
        model, runs it and returns the outputs). Every swapped module then runs both ways and is rolled back if the
        results disagree.
    strict: False also accepts modules that fit in structure but run an unknown version of the code, provided
        that they pass ``verify``.
    weights: "int8" or "bf16" to run the products of linear layers on copies of their weights in this format, in
        inference on a CPU; parameters and state dict stay. None leaves things as they are. ``report.weights`` names the
        weights, and those that stay in float32 with the reason; torch's own linear layers are swapped in every model.
        With ``verify``, products whose error stands out stay in float32. ``only`` and ``exclude`` select modules here
        too. ``model.train()`` raises RuntimeError until ``restore``.
    weights_error: the largest change of the model's outputs on the inputs of ``verify`` that ``weights`` may cause,
        as the rms of the difference relative to the rms of the output.
    ragged: True to leave padding out of the encoders that can: they run on the frames that exist. Their rows in the
        report, and ``report.ragged``, say which do and why others do not. A call that needs padded frames (output of
        every layer, hooks) runs on the padded batch and warns.
    graphs: True, or :class:`fastasr.Graphs` with options, to record the calls of encoders as CUDA graphs, forward and
        backward, and replay them: a call then costs the host a few milliseconds. ``report.graphs`` says which encoders
        are recorded and why others are not, ``fastasr.graph_state(model)`` counts their replays.

    Raises TypeError if model is not a torch.nn.Module or a selector has another type, ValueError if a pattern matches
    nothing, ``strict=False`` is given without ``verify``, or ``weights`` is no such format or the model is in training
    mode with it.
    """
    if not strict and verify is None:
        raise ValueError(
            "accelerate: strict=False accepts unknown code only when it is verified; pass verify=inputs"
        )
    if not isinstance(graphs, (bool, Graphs)):
        raise TypeError(f"accelerate: graphs takes a bool or fastasr.Graphs, got {type(graphs).__name__}")
    if isinstance(graphs, Graphs) and graphs.frames is not None and not ragged:
        raise ValueError("accelerate: Graphs(frames=...) leaves padding out: pass ragged=True with it")
    modules, only, exclude = _selection(model, only, exclude)
    if weights is not None:
        reduced.check(model, weights, weights_error)
    # The state to restore if anything raises an error. Without inputs no code runs that changes values of tensors.
    state = None if verify is None else ModelState(model)
    before = Reach((model,)) if state is None else state
    report = SwapReport(type(model).__name__)
    unproven: set[str] = set()
    try:
        plan = _plan(modules, only, exclude, every_linear=weights is not None)
        if verify is not None:
            before.restore()  # The rules have read the user's modules, which may have run the user's code.
        for path, module, decision in plan:
            accept = decision.apply or (decision.unknown_source and not strict)
            if accept and decision.rule is not None and binding.bound_forward(module) is None:
                decision.rule.bind(module, decision.known)
            if accept and not decision.apply:
                unproven.add(path)
            report.rows.append(_row(path, module, decision, accept))
        if state is not None:
            _verify(model, verify, report, unproven, state)
        if ragged:
            _leave_padding_out(plan, report)
        if weights is not None:

            def chosen(path: str, module: nn.Module) -> bool:
                return (only is None or only(path, module)) and (exclude is None or not exclude(path, module))

            report.weights = reduced.keep(model, weights, chosen, verify, weights_error, state)
        if graphs:
            _record(plan, report, Graphs() if graphs is True else graphs)
        _note_leaving(plan, report)
    except BaseException:
        before.restore()
        raise
    return report


def _note_leaving(plan: Plan, report: SwapReport) -> None:
    """Says in the report which methods of its replaced modules are known to leave the fast path now."""
    for (_, module, decision), row in zip(plan, report.rows, strict=True):
        rule = (decision.later or decision).rule
        if row.status == REPLACED and rule is not None:
            for method, reason in rule.leaving(module).items():
                row.reason += f"; {method} leaves the fast path: {reason}" if reason else ""


def _leave_padding_out(plan: Plan, report: SwapReport) -> None:
    """Binds the forward without padding to every swapped encoder that has one, after verification, which compares
    padded batches."""
    report.ragged = {}
    for (_, module, decision), row in zip(plan, report.rows, strict=True):
        made = decision.later or decision
        rule = made.rule
        if rule is None or rule.ragged is None or _is_own(module):
            continue
        swapped = binding.bound_forward(module) is not None or (made is decision.later and made.apply)
        reason = rule.asked(rule.ragged.why_not, module) if swapped else made.reason
        if reason is None:
            binding.bind(module, rule.ragged.forward, rule.methods)
            row.rule, row.status = rule.name, REPLACED
        _note_padding(report, row, reason)
    for (path, _, decision), row in zip(plan, report.rows, strict=True):
        made = decision.later or decision
        inside = f"{path}." if path else ""
        if made.rule is None or any(other.startswith(inside) for other in report.ragged):
            continue
        if made.rule.padded:
            _note_padding(report, row, made.rule.padded if made.apply else made.reason)


def _note_padding(report: SwapReport, row: Row, reason: str | None) -> None:
    """Says in the report that the row's encoder runs without padding, or the reason why it does not."""
    report.ragged = (report.ragged or {}) | {row.path: reason}
    row.reason += "; runs without padding" if reason is None else f"; runs on padding: {reason}"


def _record(plan: Plan, report: SwapReport, options: Graphs) -> None:
    """Has the calls of every encoder recorded that a rule can record: swapped ones, and fastasr's own."""
    report.graphs = {}
    missing = (
        "there is no CUDA device" if options.recorder is None and not torch.cuda.is_available() else None
    )
    for (path, module, decision), row in zip(plan, report.rows, strict=True):
        made = decision.later or decision
        rule = made.rule
        if rule is None or rule.graphs is None:
            continue
        bound = binding.bound_forward(module)
        if bound is rule.replay_part and type(module).__name__ != rule.class_name:
            continue  # It is a part of a recorded encoder, from an earlier call.
        fits = row.status == REPLACED or (made is decision.later and made.apply) or _is_own(module)
        on_row = rule.graphs.on_row_of(module) if options.frames is not None else None
        no_row = on_row.why_not(module) if on_row is not None and fits else None
        on_row = None if no_row is not None else on_row
        why_not = rule.graphs.why_not(module) if on_row is None else None
        reason = (missing or recording.why_not_recordable(module) or why_not) if fits else made.reason
        inside = f"{path}." if path else ""
        packs = any(why is None and other.startswith(inside) for other, why in (report.ragged or {}).items())
        runs_ragged = rule.ragged is not None and bound is rule.ragged.forward
        runs_ragged = runs_ragged or (_is_own(module) and getattr(module, "ragged", False))
        if reason is None and on_row is None and (packs or runs_ragged):
            reason = _RAGGED
            if rule.graphs.on_row_of(module) is not None:
                reason += _ON_ROWS if no_row is None else f", and not on a row: {no_row}"
        whole = (f"{other}." if other else "" for other, why in report.graphs.items() if why is None)
        if path.startswith(tuple(whole)):
            continue  # It is a part of a recorded encoder.
        if reason is None:
            _bind_recorded(module, rule, rule.graphs, options, on_row)
            row.rule, row.status = rule.name, REPLACED
        by_shape = "" if no_row is None else f" by shape, not on a row: {no_row}"
        row.reason += f"; its calls are recorded{by_shape}" if reason is None else f"; not recorded: {reason}"
        report.graphs[path] = reason


def _bind_recorded(
    module: nn.Module, rule: Rule, graphs: Graphed, options: Graphs, on_row: OnRow | None
) -> None:
    own = _is_own(module)
    parts = graphs.parts(module)
    options = options if parts else replace(options, parts=False)
    if on_row is not None or not (options.parts and parts):
        forward, replay = (upstream_forward, rule.replay_part) if own else (rule.recorded, rule.replay)
        # fastasr's own encoders leave padding out by themselves
        if on_row is not None and not own and rule.ragged is not None and rule.replay_row is not None:
            forward, replay = rule.ragged.forward, rule.replay_row
        elif on_row is not None and on_row.instead is not None:
            forward = on_row.instead
        recording.keep(module, forward, options, graphs.choice, on_row=on_row)
        binding.bind(module, replay, () if own else rule.methods)
    rules = rules_by_forward()
    for part in parts:
        bound = binding.bound_forward(part)
        its = rules.get(bound)
        if bound is None or bound is rule.replay_part:
            forward, replay, methods = upstream_forward, rule.replay_part, ()
        elif its is not None and bound in (its.recorded, its.replay):
            forward, replay, methods = its.recorded, its.replay, its.methods
        else:  # the code of another version
            continue
        recording.keep(part, forward, options, whole=not options.parts)
        binding.bind(part, replay, methods)


def _verify(
    model: nn.Module, inputs: Any, report: SwapReport, unproven: set[str], before: ModelState
) -> None:
    checked = run_verification(model, inputs, whole=before)
    report.verified = True
    modules = dict(model.named_modules())
    results = {row.path: row for row in checked.rows}
    for row in report.rows:
        result = results.get(row.path)
        if result is None:
            continue
        row.status, row.errors = result.status, result.errors
        row.allowed, row.like = result.allowed, result.like
        if result.status == ROLLED_BACK:
            row.reason = result.reason
        elif row.path in unproven and result.errors is None:
            binding.unbind(modules[row.path])
            row.status = ROLLED_BACK
            row.reason = f"{row.reason}, and the inputs of verify do not reach it"
        elif result.reason:
            row.reason = f"{row.reason}; {result.reason}" if row.reason else result.reason


def explain(model: nn.Module, only: Selection = None, exclude: Selection = None) -> SwapReport:
    """Returns the report that ``accelerate`` would return, and changes nothing. It raises the same errors.

    It also says whether encoders that ``accelerate(ragged=True)`` made run without padding still can: a module may have
    got a hook meanwhile, for example.
    """
    report = SwapReport(type(model).__name__, dry_run=True)
    plan = _plan(*_selection(model, only, exclude))
    for path, module, decision in plan:
        report.rows.append(_row(path, module, decision, decision.apply))
        rule = decision.rule
        ragged = rule.ragged if rule is not None else None
        if rule and ragged and binding.bound_forward(module) in (ragged.forward, rule.replay_row):
            reason = why_not_hooked(module) or rule.asked(ragged.why_not, module)
            _note_padding(report, report.rows[-1], reason)
    _note_leaving(plan, report)
    return report


def restore(model: nn.Module) -> Restored:
    """Gives every swapped module of ``model`` its own forward back. Returns the number of these modules, a
    :class:`fastasr.swap.report.Restored`, which prints the modules that were restored and those that were not."""
    _check_model("restore", model)
    weights = reduced.release(model)
    graphs = sum(recording.release(module) is not None for module in model.modules())
    rules, count, left = rules_by_forward(), 0, []
    modules = list(model.named_modules())
    for path, module in modules:
        guarded, bound = binding.is_guarded(module), binding.unbind(module) or _paused.pop(module, None)
        if bound is not None:
            rules[bound[0]].release(module)
            count += 1
        elif guarded:
            left.append(path)
    return Restored(count, type(model).__name__, len(modules), left, weights, graphs)


def refresh(model: nn.Module) -> int:
    """Has everything that is kept of ``model`` between calls made again at the next call: packed weights, positions,
    weights in fewer bits, engines. Returns the number of these things.

    Changes of the parameters are noticed without it, except writes to a few elements that torch does not count
    (through ``parameter.data``, a NumPy view or another process), any such write on a GPU, and changes of plain
    attributes such as a norm's ``eps``. See :mod:`fastasr.ops._kept`.
    """
    _check_model("refresh", model)
    for module in model.modules():
        graphs = recording.of(module)
        if graphs is not None:
            graphs.clear(module)
    return _kept.drop([*model.parameters(), *model.buffers()])


@contextlib.contextmanager
def eager_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Runs upstream's code inside the block and brings the swap back after it, unless ``restore`` was called inside.
    TorchScript and ONNX export need this."""
    _check_model("eager_mode", model)
    swapped = [(module, functions) for module in model.modules() if (functions := binding.unbind(module))]
    _paused.update(swapped)
    try:
        yield model
    finally:
        for module, functions in swapped:
            if _paused.pop(module, None) is not None and binding.foreign_forward(module) is None:
                binding.bind(module, *functions)


def _check_model(function: str, model: object) -> None:
    if not isinstance(model, torch.nn.Module):
        hint = ""
        if returnn.is_module(model):
            hint = " of RETURNN's, whose E-Branchformer fastasr.models.e_branchformer.from_returnn converts"
        raise TypeError(f"{function}: model must be a torch.nn.Module, got {type(model).__name__}{hint}")


def _row(path: str, module: nn.Module, decision: Decision, accept: bool) -> Row:
    rule = decision.rule
    status = REPLACED if accept else SKIPPED
    kernels = rule.kernels if rule is not None else ()
    reason, parameter = decision.reason, next(module.parameters(), None)
    if accept and parameter is not None:
        eager = why_eager(kernels, parameter.device, parameter.dtype)
        reason = "; ".join(filter(None, (reason, eager)))
    return Row(path, type(module).__name__, rule.name if rule else None, kernels, status, reason)


def _selection(
    model: nn.Module, only: Selection, exclude: Selection
) -> tuple[list[tuple[str, nn.Module]], Selected | None, Selected | None]:
    """Returns the model's modules with their paths, and ``only`` and ``exclude`` as functions or None."""
    _check_model("accelerate", model)
    modules = list(model.named_modules())
    return modules, _selector("only", only, modules), _selector("exclude", exclude, modules)


def _plan(
    modules: list[tuple[str, nn.Module]],
    only: Selected | None,
    exclude: Selected | None,
    every_linear: bool = False,
) -> Plan:
    """Returns [(path, module, Decision)] for every module."""
    decisions = [decide(module) for _, module in modules]
    matched = {id(d.rule) for d in decisions if d.apply and d.rule is not None and not d.rule.companion}
    companions = {rule for family in FAMILIES if any(id(r) in matched for r in family) for rule in family}
    if every_linear:
        companions.add(LINEAR)
    plan = []
    for (path, module), decision in zip(modules, decisions, strict=True):
        rule = decision.rule
        fits = decision.apply or decision.unknown_source
        unbound = binding.bound_forward(module) is None
        if rule is not None and unbound and rule.companion and rule not in companions:
            if fits:
                decision = Decision(rule, False, _ALONE)
            elif rule.known is None and rule is not LINEAR:  # a class of torch's, which few families list
                decision = Decision(None, False, _NO_RULE)
        elif rule is not None and unbound and fits:
            if only is not None and not only(path, module):
                decision = Decision(rule, False, "not selected by only=")
            elif exclude is not None and exclude(path, module):
                decision = Decision(rule, False, "excluded by exclude=")
        if rule is not None and rule.is_optional and unbound:
            decision = Decision(None, False, _CONTAINER, later=decision)
        plan.append((path, module, decision))
    return plan


def decide(module: nn.Module) -> Decision:
    rule = _rule_for(module)
    if isinstance(module, torch.jit.ScriptModule):
        return Decision(None, False, "compiled by TorchScript")
    if rule is None:
        if (reason := returnn.reason(module)) is not None:
            return Decision(None, False, reason)
        container = next(module.children(), None) is not None
        return Decision(None, False, _CONTAINER if container else _NO_RULE)
    forward = binding.bound_forward(module)
    if forward is not None:
        return Decision(rule, True, "already swapped")
    reason = _why_not(module, rule) or rule.asked(rule.structure, module)
    if reason is not None or rule.forward is None:
        return Decision(rule, reason is None, reason or "upstream's code, with what is swapped inside")
    return _recognise(rule, module)


def _rule_for(module: nn.Module) -> Rule | None:
    bound = binding.bound_forward(module)
    names = [cls.__name__ for cls in type(module).__mro__]
    rules = dict.fromkeys(
        rule
        for family in FAMILIES
        for rule in family
        if (bound in rule.forwards and (bound is not rule.replay_part or rule.class_name in names))
        or (bound is None and rule.class_name in names and _may_be(rule, module))
    )
    if len(rules) < 2:
        return next(iter(rules), None)
    # several frameworks have a class of this name
    return max(
        rules,
        key=lambda rule: (
            rule.forward is getattr(type(module), "forward", None),  # of fastasr's own class
            rule.forward is not None and _recognise(rule, module).apply,
            rule.asked(rule.structure, module) is None,
        ),
    )


def _may_be(rule: Rule, module: nn.Module) -> bool:
    """Says whether a class with the name of the rule's can be this class. A class of another framework that has rules
    is one only if it has the same code, and torch's classes are nowhere but in torch."""
    if rule.forward is None:
        return True
    framework = rule.name.partition(".")[0]
    homes = {
        cls.__module__.partition(".")[0] for cls in type(module).__mro__ if cls.__name__ == rule.class_name
    }
    homes = {_OTHER_NAMES.get(home, home) for home in homes}
    if rule.known is None or framework in homes:
        return framework in homes
    return not homes <= _FRAMEWORKS or rule.asked(lambda m: _recognise(rule, m).apply, module) is True


def _why_not(module: nn.Module, rule: Rule) -> str | None:
    """Returns why nothing may be bound to this instance, for any class; None if there is no such reason."""
    if _is_own(module):
        return "is fastasr's own class already"
    for method in ("forward", *(name for name, _ in rule.methods)):
        foreign = binding.foreign_method(module, method)
        if foreign is not None:
            name = getattr(foreign, "__qualname__", type(foreign).__name__)
            return f"its {method} was already replaced on this instance, by {name}"
    if parametrize.is_parametrized(module):
        names: Any = module.parametrizations
        return f"has parametrizations on {', '.join(names)}"
    kinds = "forward pre-hook", "forward hook", "backward pre-hook", "backward hook"
    for what, hooks in zip(kinds, hooks_of(module), strict=True):
        unknown = [h for h in hooks.values() if full_name(h) not in rule.hooks]
        if unknown:
            names = [getattr(h, "__qualname__", type(h).__name__) for h in unknown]
            return f"has a {what}: {', '.join(names)}"
    return None


def _is_own(module: nn.Module) -> bool:
    return type(module).__module__.startswith("fastasr.")


def _recognise(rule: Rule, module: nn.Module) -> Decision:
    note = f"; {rule.note}" if rule.note else ""
    if rule.known is None:
        forward = upstream_class(module).forward
        if not forward.__module__.startswith("torch.nn."):
            return Decision(rule, False, f"{rule.class_name}.forward was replaced by {forward.__qualname__}")
        return Decision(rule, True, f"torch's own class{note}")
    owner = upstream_class(module)
    try:
        value = fingerprint(rule.functions(module), owner)
    except SourceUnavailable as error:
        return Decision(rule, False, f"its source cannot be read: {error}")
    known = rule.known.get(value)
    if known is not None:
        reason = known.condition(module) if known.condition is not None else None
        return Decision(rule, reason is None, reason or f"same source as {known.origin}{note}", known=known)
    if owner.__name__ != rule.class_name:
        changed = ", ".join(_overridden(owner, rule.class_name)) or "something its forward uses"
        return Decision(
            rule, False, f"{owner.__name__} is a subclass of {rule.class_name} that overrides {changed}"
        )
    reason = f"its source is no known version of {rule.class_name} (fingerprint {value})"
    return Decision(rule, False, reason, unknown_source=True)


def _overridden(owner: type, class_name: str) -> list[str]:
    names = []
    for cls in owner.__mro__:
        if cls.__name__ == class_name:
            break
        names += [name for name, value in vars(cls).items() if callable(value) and name != "__init__"]
    return names


def _selector(name: str, value: Selection, modules: list[tuple[str, nn.Module]]) -> Selected | None:
    """Returns ``only`` or ``exclude`` as one function (path, module) -> bool; None if it is not given."""
    if value is None:
        return None
    parts: list[Any] = list(value) if isinstance(value, (list, tuple, set, frozenset)) else [value]
    for part in parts:
        if isinstance(part, str):
            if not any(fnmatch.fnmatchcase(path, part) for path, _ in modules):
                raise ValueError(f"accelerate: {name} pattern {part!r} matches no module of the model")
        elif not callable(part):
            raise TypeError(
                f"accelerate: {name} takes glob patterns, classes or callables (path, module) -> bool, "
                f"got {type(part).__name__}"
            )

    def selected(path: str, module: nn.Module) -> bool:
        for part in parts:
            if isinstance(part, str):
                hit = fnmatch.fnmatchcase(path, part)
            elif isinstance(part, type):
                hit = isinstance(module, part)
            else:
                hit = bool(part(path, module))
            if hit:
                return True
        return False

    return selected
