# SPDX-License-Identifier: Apache-2.0
"""The code of an op, with names in braces for the fragments that :mod:`opgen.fragments` writes.

A line that is one fragment alone takes any number of lines, or none. Each name of the signature is written out, so a
call costs no loop.
"""

TOP = """
op = OPS["{name}"]
family = op.family
{codes}


{arguments_tuple}


{saved_tuple}
"""

PUBLIC = """
# --------------------------------------------------------------------------- the public function
{overloads}
def {name}({typed_parameters}) -> {return_type}:
    {docstring}
    {shortest_path}
    check({names})
    {formula_under_autocast}
    if is_compiling() or not ({plain}):
        return traced({names})
    if {transformed}:
        return by_formula(op, Arguments({names}))
    kernels = family.kernels({deciding})
    if kernels is None:
        return laid_out(op, {formula})
    {cast}
    try:
        {apply}
        {results} = run_kernels(kernels, {names}{not_keeping})
    except Unlaunchable as error:
        family.give_up(error, {deciding})
        return {formula}
    return {selected}


def check({typed_arguments}) -> None:
    \"\"\"Raises if the arguments do not fit the declaration.\"\"\"
    {checks}


def traced({names}):
    \"\"\"Serves torch.compile, torch.export and subclasses of tensors by the registered operator.\"\"\"
    if not served("{family}", {deciding}):
        return {formula}
    {results} = operator({names}{keep_if_wanted})
    return {selected}


def run_kernels(kernels, {names}{keep}):
    \"\"\"Calls kernels with tensors as they read them, and gives the results the declared dtypes.\"\"\"
    {launch}
    return {found}


def result_dtypes(a) -> tuple[torch.dtype, ...]:
    return {result_dtypes}
"""

SHORTEST_PATH = """
kernels = family.native
if (
    {conditions}
):
    try:
        {apply_direct}
        {results} = {native}
        return {selected}
    except NOT_MINE:
        pass  # the checked path takes what the kernels decline
    except RuntimeError:
        # tells what is wrong with the arguments, if anything is
        check({names})
        raise
"""

NODE = """
# --------------------------------------------------------------------------- gradients without the dispatcher
class {class_name}(Function):
    @staticmethod
    def forward(ctx, kernels, direct, {names}):
        {forward}
        {not_views}
        ctx.save_for_backward({saves_directly})
        ctx.rest = {rest}
        {materialize}
        {constants}
        return {selected}

    @staticmethod
    def backward(ctx, {optional_grads}, *_):
        if is_grad_enabled():
            refuse_double_backward("{name}")
        # once: a checkpoint gives them one time
        {saves_directly}, = ctx.saved_tensors
        {rest_names} = ctx.rest
        {likes}
        {no_grads}
        {native_backward}
        {gradients}, = node_gradients(op, kernels, ({grads},), make(Saved, ({saved},)){needed})
        return None, None, {for_autograd}


def differentiate(kernels, grads, saved, needs=None):
    \"\"\"Returns the gradients by the kernels, each in its tensor's dtype.\"\"\"
    {differentiate}
    return {gradients_tuple}


apply = applied({class_name})
"""

OPERATOR = """
# --------------------------------------------------------------------------- the registered operator
def fake({operator_parameters}):
    {sizes}
    return {empty}


op.serve(
    {name},
    Written(
        {written}
    ),
)
operator = register_op(
    op,
    {schemas}
)
"""
