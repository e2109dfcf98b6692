# SPDX-License-Identifier: Apache-2.0
"""The part of an op's page that says how to check and measure the op at any shapes."""

from fastasr import ops
from fastasr.testing.declared import declared
from fastasr.testing.speed import sizes_of

FEW = (20, 2)  # frames and sequences

TEXT = """```python
from fastasr.testing import Make, gradcheck, sized

# or tensors of your own: {tensors}
arguments = sized("{op}", {arguments}).arguments(Make())
assert gradcheck("{op}", **arguments).ok
```

From the shell:

- `fastasr check {op} --shape {shape} --dtype bfloat16`
- `fastasr bench {op} --shape {shape} --compile`"""


def recipe(name: str) -> str:
    """Returns the recipe of one op, with all of its sizes."""
    defaults = sizes_of(name)
    sizes = defaults | dict(zip(defaults, FEW, strict=False))
    shape = ",".join(f"{n}={size}" for n, size in sizes.items())
    tensors = ", ".join(a.name for a in declared(ops.OPS[name]).tensors if not a.optional)
    return TEXT.format(op=name, tensors=tensors, arguments=shape.replace(",", ", "), shape=shape)


def recipes(names: list[str]) -> str:
    """Returns the recipes of the ops that share a page."""
    return "\n\n".join(map(recipe, names))
