# SPDX-License-Identifier: Apache-2.0
"""Rules for torchaudio's RNN-T: the LSTM layers of its predictor (torchaudio.models.rnnt)."""

from fastasr.models import emformer_rnnt as models
from fastasr.models.emformer_rnnt.predictor import why_by_steps
from fastasr.swap.rule import Known, Rule, Upstream, check_parameters, upstream_class

_TORCHAUDIO = Known("torchaudio 2.11")


def _lstm_structure(module: Upstream) -> str | None:
    reason = check_parameters(module, {})
    children = {name: upstream_class(child).__name__ for name, child in module._modules.items()}
    norms = ("LayerNorm", "LayerNorm"), ("Identity", "Identity")
    if reason is None and sorted(children) != ["c_norm", "g_norm", "p2g", "x2g"]:
        reason = f"has the submodules {', '.join(sorted(children))}, expected c_norm, g_norm, p2g, x2g"
    if reason is None and (children["x2g"], children["p2g"]) != ("Linear", "Linear"):
        reason = f"x2g and p2g are {children['x2g']} and {children['p2g']}, expected Linear"
    if reason is None and (children["c_norm"], children["g_norm"]) not in norms:
        reason = (
            f"c_norm and g_norm are {children['c_norm']} and {children['g_norm']}, expected two of a kind"
        )
    if reason is None and tuple(module.p2g.weight.shape) != (4 * module.hidden_dim, module.hidden_dim):
        shape = tuple(module.p2g.weight.shape)
        reason = f"p2g.weight has shape {shape}, expected {(4 * module.hidden_dim, module.hidden_dim)}"
    if reason is None and module.x2g.weight.shape[0] != 4 * module.hidden_dim:
        reason = f"x2g has {module.x2g.weight.shape[0]} outputs, expected {4 * module.hidden_dim}"
    return reason


LSTM = Rule(
    name="torchaudio.custom_lstm",
    class_name="_CustomLSTM",
    forward=models.CustomLSTM.forward,
    kernels=("layer_norm_lstm",),
    structure=_lstm_structure,
    known={"84839b197b50092babee297b": _TORCHAUDIO},
    leaves=lambda module: {"forward": why_by_steps(module)},
)

RULES = (LSTM,)
