# SPDX-License-Identifier: Apache-2.0
"""Tables of the rules: the code that serves each class of a framework, and why it declines an instance. ``tables.py``
writes them into docs/frameworks/classes.md.
"""

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator

from fastasr.benchmarks.markdown import grid
from fastasr.swap.rule import Rule
from fastasr.swap.rules import FAMILIES, returnn

# heading, page in docs/frameworks, prefixes of the rules' names
FRAMEWORKS = (
    ("transformers", "transformers.md", ("transformers.",)),
    ("NeMo", "nemo.md", ("nemo.",)),
    ("SpeechBrain", "speechbrain.md", ("speechbrain.",)),
    ("FireRedASR", "fireredasr.md", ("fireredasr.",)),
    ("FunASR", "funasr.md", ("funasr.",)),
    ("GigaAM", "gigaam.md", ("gigaam.",)),
    ("torchaudio", "torchaudio.md", ("torchaudio.",)),
    ("openai-whisper", "openai_whisper.md", ("openai_whisper.",)),
    ("ESPnet", "espnet.md", ("espnet.",)),
    ("icefall and the PyPI package `zipformer`", "icefall.md", ("zipformer.",)),
    ("torch, beside a class above", "../swap.md#what-is-replaced", ("torch.",)),
)


def rules() -> list[Rule]:
    """Returns the rules that swap a forward."""
    return list(dict.fromkeys(rule for family in FAMILIES for rule in family if rule.forward is not None))


def _reasons(function: Callable, seen: set) -> Iterator[str]:
    """Yields the texts that the function returns, and the texts of functions of rules and models that it calls. "…"
    stands for a part that depends on the instance.
    """
    function = inspect.unwrap(function)
    if function in seen or not getattr(function, "__module__", "").startswith(
        ("fastasr.swap.rules", "fastasr.swap.forwards", "fastasr.models")
    ):
        return
    seen.add(function)
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    names = {**function.__globals__, **inspect.getclosurevars(function).nonlocals}
    for node in ast.walk(tree):
        if isinstance(node, ast.Return) and isinstance(node.value, ast.Constant | ast.JoinedStr):
            parts = node.value.values if isinstance(node.value, ast.JoinedStr) else [node.value]
            text = "".join(str(p.value) if isinstance(p, ast.Constant) else "…" for p in parts)
            # Other texts say nothing without the instance.
            if text != "None" and len(text.split()) > 2 * text.count("…"):
                yield text
        elif isinstance(node, ast.Call):
            called = names.get(node.func.id) if isinstance(node.func, ast.Name) else None
            if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
                called = getattr(names.get(node.func.value.id), node.func.attr, None)
            if inspect.isfunction(called):
                yield from _reasons(called, seen)


def _line(rule: Rule) -> list[str]:
    origins = dict.fromkeys(known.origin for known in (rule.known or {}).values())
    declined = (
        "; ".join(dict.fromkeys(_reasons(rule.structure, set())))
        if inspect.isfunction(rule.structure)
        else ""
    )
    ops = ", ".join(f"`{name}`" for name in rule.kernels)
    cells = f"`{rule.class_name}`", ops or "–", ", ".join(origins) or "–", declined or "–", rule.note or "–"
    return [cell.replace("|", "\\|") for cell in cells]


def table() -> str:
    """Returns a section and a table for each framework. Raises ``ValueError`` if a rule belongs to none."""
    left, blocks = rules(), []
    for heading, page, prefixes in FRAMEWORKS:
        own = [rule for rule in left if rule.name.startswith(prefixes)]
        left = [rule for rule in left if rule not in own]
        use = f"[How to use it, and which calls run upstream's code]({page})"
        heads = "class", "ops", "known code", "declined because", "the report adds"
        blocks.append("\n".join([f"## {heading}", "", use, "", *grid(heads, map(_line, own))]))
    if left:
        raise ValueError(f"rules of no framework: {', '.join(rule.name for rule in left)}")
    why = f"fastasr swaps no module of RETURNN's: each {returnn._NEVER_CALLED}."
    blocks.append(f"## RETURNN\n\n{why} [How its encoders are converted](returnn.md)")
    return "\n\n".join(blocks)
