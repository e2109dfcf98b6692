# SPDX-License-Identifier: Apache-2.0
"""Converts RETURNN's E-Branchformer (``returnn.frontend.encoder.e_branchformer``) to ours and back, bit for bit.

RETURNN's modules are not ``torch.nn.Module``s. They compute on RETURNN's own tensors, whose axes are named, and draw
their own random numbers, so the swap cannot bind our forward to them. Their parameters convert exactly:

    ffn1, ffn2.{linear_ff, linear_out}           feed_forward_macaron, feed_forward.{w_1, w_2}    transposed
    {ffn1, ffn2, self_att, cgmlp, final}_layer_norm.scale   norm_{ff_macaron, ff, mha, mlp, final}.weight
    self_att.qkv                                 attn.linear_{q, k, v}       transposed; q, k, v alternate by head
    self_att.proj, pos_bias_{u, v}               attn.linear_out, pos_bias_{u, v}                 proj transposed
    self_att.linear_pos                          attn.linear_pos             transposed; sines first, of key less query
    cgmlp.linear_ff                              cgmlp.channel_proj1.0       transposed; the gate comes first
    cgmlp.{norm.scale, conv.filter, linear_out}  cgmlp.{csgu.norm.weight, csgu.conv.weight, channel_proj2}
    merge.{depthwise_conv_fusion.filter, merge_proj}   depthwise_conv_fusion.weight, merge_proj
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastasr.models.e_branchformer.layer import EBranchformerLayer
from fastasr.models.e_branchformer.positional_encoding import relative_sinusoids

# RETURNN's name -> our name, and whether the weight is transposed. The code below converts qkv, linear_pos and
# cgmlp.linear_ff.
_LINEARS = {
    "ffn1.linear_ff": "feed_forward_macaron.w_1",
    "ffn1.linear_out": "feed_forward_macaron.w_2",
    "ffn2.linear_ff": "feed_forward.w_1",
    "ffn2.linear_out": "feed_forward.w_2",
    "self_att.proj": "attn.linear_out",
    "cgmlp.linear_out": "cgmlp.channel_proj2",
    "merge.merge_proj": "merge_proj",
}
_NORMS = {
    "ffn1_layer_norm": "norm_ff_macaron",
    "ffn2_layer_norm": "norm_ff",
    "self_att_layer_norm": "norm_mha",
    "cgmlp_layer_norm": "norm_mlp",
    "final_layer_norm": "norm_final",
    "cgmlp.norm": "cgmlp.csgu.norm",
}
_CONVOLUTIONS = {"cgmlp.conv": "cgmlp.csgu.conv", "merge.depthwise_conv_fusion": "depthwise_conv_fusion"}
_TRANSPOSED = {f"{k}.weight": f"{v}.weight" for k, v in _LINEARS.items()}
_EQUAL = {
    **{f"self_att.pos_bias_{x}": f"attn.pos_bias_{x}" for x in "uv"},
    **{f"{k}.scale": f"{v}.weight" for k, v in _NORMS.items()},
    **{f"{k}.filter": f"{v}.weight" for k, v in _CONVOLUTIONS.items()},
    **{f"{k}.bias": f"{v}.bias" for k, v in (_LINEARS | _NORMS | _CONVOLUTIONS).items()},
}


class EBranchformerStack(torch.nn.Module):
    """x (B, T, in_dim), mask (B, T), True at valid frames, or None -> (B, T, D).

    It computes what RETURNN's ``ConformerEncoder`` with E-Branchformer layers computes after its input layer.
    """

    layers: Any  # a ModuleList of EBranchformerLayer

    def __init__(
        self,
        layers: Sequence[torch.nn.Module],
        input_projection: torch.nn.Linear | None = None,
        scale: float = 1.0,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.input_projection = input_projection
        self.scale = scale
        self.dropout = torch.nn.Dropout(dropout)
        self.layers = torch.nn.ModuleList(layers)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.input_projection is not None:
            x = self.input_projection(x)
        x = self.dropout(x * self.scale)
        positions = relative_sinusoids(x.shape[1], x.shape[2]).to(x)
        mask = None if mask is None else mask.unsqueeze(1)
        for layer in self.layers:
            (x, _), _ = layer((x, positions), mask)
        return x


def from_returnn(module: Any) -> "EBranchformerLayer | EBranchformerStack":
    """Converts a RETURNN module with its sizes, rates and epsilons.

    A ``EBranchformerLayer`` (rf.Module) becomes an :class:`EBranchformerLayer`; a ``ConformerEncoder`` of such layers
    becomes an :class:`EBranchformerStack`, without the input layer. The module may be wrapped by RETURNN's
    ``rf_module_to_pt_module``.

    The two agree at padded frames only if RETURNN does not mask outside attention (``rf_use_mask`` off). Raises
    TypeError for another module and ValueError for an option that our layer does not have.
    """
    module = getattr(module, "_rf_module", module)  # RETURNN's wrapper for PyTorch keeps the module here
    name = type(module).__name__
    if name == "ConformerEncoder":
        if module.pos_enc is not None:
            raise ValueError("from_returnn: pos_enc: expected None, got an absolute encoding")
        projection = None
        if module.input_projection is not None:
            weight = _tensors(module.input_projection)["weight"]
            projection = torch.nn.Linear(weight.shape[0], weight.shape[1], False, weight.device, weight.dtype)
            with torch.no_grad():
                projection.weight.copy_(weight.t())
        layers = [from_returnn(layer) for layer in module.layers]
        return EBranchformerStack(layers, projection, module.input_embedding_scale, module.input_dropout)
    if name != "EBranchformerLayer":
        raise TypeError(f"from_returnn: module: expected EBranchformerLayer or ConformerEncoder, got {name}")
    return _layer(module)


def _layer(module: Any) -> EBranchformerLayer:
    attention, gated = module.self_att, module.cgmlp
    for part, expected in (
        (attention, "RelPosSelfAttention"),
        (gated, "FeedForwardConvGated"),
        (module.ffn1, "ConformerPositionwiseFeedForward"),
        (module.ffn2, "ConformerPositionwiseFeedForward"),
        (module.final_layer_norm, "LayerNorm"),
    ):
        if type(part).__name__ != expected:
            raise ValueError(f"from_returnn: expected a {expected}, got a {type(part).__name__}")
    if attention.learned_pos_emb is not None or attention.linear_pos is None or attention.pos_bias_u is None:
        raise ValueError(
            "from_returnn: self_att: expected sinusoids with linear_pos, pos_bias_u and pos_bias_v (the default)"
        )
    if not attention.separate_pos_emb_per_head or attention.pos_emb_dropout:
        raise ValueError("from_returnn: self_att: expected separate_pos_emb_per_head and no pos_emb_dropout")
    tensors = _tensors(module)
    eps = module.final_layer_norm.eps
    first = next(iter(tensors.values()))
    with first.device:  # torch's default device may be another
        layer = EBranchformerLayer(
            module.out_dim.dimension,
            ff_dim=tensors["ffn1.linear_ff.weight"].shape[1],
            ff_activation=_activation("ff_activation", module.ffn1.activation),
            dropout=module.dropout,
            num_heads=attention.num_heads.dimension,
            att_dropout=attention.att_dropout,
            cgmlp_ff_dim=gated.ff_dim.dimension,
            cgmlp_conv_kernel=tensors["cgmlp.conv.filter"].shape[-1],
            merge_conv_kernel=tensors["merge.depthwise_conv_fusion.filter"].shape[-1],
            norm=lambda width: torch.nn.LayerNorm(width, eps=eps),
            cgmlp_options={
                "activation": _activation("activation", gated.activation),
                "gate_activation": _activation("gate_activation", gated.gate_activation),
                "with_bias": "cgmlp.linear_ff.bias" in tensors,
            },
        )
    layer.to(first.dtype)
    state = layer_state_from_returnn(tensors)
    if attention.qkv.bias is None:  # without a bias in RETURNN, ours is 0
        width = module.out_dim.dimension
        for part in ("linear_q", "linear_k", "linear_v", "linear_out"):
            state[f"attn.{part}.bias"] = first.new_zeros(width)
    layer.load_state_dict(state)
    return layer


def _activation(argument: str, function: Callable[..., Any]) -> str:
    """Returns the name of RETURNN's activation function."""
    name = {"swish": "silu"}.get(function.__name__, function.__name__)
    if name not in ("gelu", "identity", "relu", "selu", "silu", "tanh"):
        raise ValueError(
            f"from_returnn: {argument}: expected one of RETURNN's named activations, got {function!r}"
        )
    return name


def _tensors(module: Any) -> dict[str, Tensor]:
    return {name: parameter.raw_tensor.detach() for name, parameter in module.named_parameters()}


def layer_state_from_returnn(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Converts the state dict of one RETURNN layer, names without ``layers.{i}.``, to :class:`EBranchformerLayer`'s."""
    state = dict(state)
    heads = state["self_att.pos_bias_u"].shape[0]
    out = {name: tensor.clone() for name, tensor in _pop(state, _EQUAL)}
    out |= {name: tensor.t().clone() for name, tensor in _pop(state, _TRANSPOSED)}
    for kind in ("weight", "bias"):
        for name, tensor in _pop(state, {f"self_att.qkv.{kind}": kind}):
            parts = tensor.t() if kind == "weight" else tensor
            parts = parts.unflatten(0, (heads, 3, -1)).transpose(0, 1)  # (3, H, d, ...)
            for part, values in zip("qkv", parts, strict=True):
                out[f"attn.linear_{part}.{name}"] = values.flatten(0, 1).clone()
        for name, tensor in _pop(state, {f"cgmlp.linear_ff.{kind}": kind}):
            out[f"cgmlp.channel_proj1.0.{name}"] = _swap_halves(tensor.t() if kind == "weight" else tensor)
    for _, tensor in _pop(state, {"self_att.linear_pos.weight": ""}):
        sines, cosines = tensor.chunk(2)
        out["attn.linear_pos.weight"] = torch.stack([-sines, cosines], 1).flatten(0, 1).t().clone()
    if state:
        raise ValueError(
            f"layer_state_from_returnn: expected an E-Branchformer layer's names, got {sorted(state)}"
        )
    return out


def layer_state_to_returnn(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Inverts :func:`layer_state_from_returnn`."""
    state = dict(state)
    heads = state["attn.pos_bias_u"].shape[0]
    out = {name: tensor.clone() for name, tensor in _pop(state, {v: k for k, v in _EQUAL.items()})}
    out |= {name: tensor.t().clone() for name, tensor in _pop(state, {v: k for k, v in _TRANSPOSED.items()})}
    for kind in ("weight", "bias"):
        names = {f"attn.linear_{part}.{kind}": part for part in "qkv"}
        parts = [tensor.unflatten(0, (heads, -1)) for _, tensor in _pop(state, names)]
        if parts:
            qkv = torch.stack(parts, 1).flatten(0, 2)
            out[f"self_att.qkv.{kind}"] = (qkv.t() if kind == "weight" else qkv).clone()
        for name, tensor in _pop(state, {f"cgmlp.channel_proj1.0.{kind}": kind}):
            swapped = _swap_halves(tensor)
            out[f"cgmlp.linear_ff.{name}"] = (swapped.t() if kind == "weight" else swapped).clone()
    for _, tensor in _pop(state, {"attn.linear_pos.weight": ""}):
        sines, cosines = tensor.t().unflatten(0, (-1, 2)).unbind(1)
        out["self_att.linear_pos.weight"] = torch.cat([-sines, cosines])
    if state:
        raise ValueError(
            f"layer_state_to_returnn: expected an E-Branchformer layer's names, got {sorted(state)}"
        )
    return out


def to_returnn(module: EBranchformerLayer | EBranchformerStack) -> dict[str, Tensor]:
    """Returns the state dict of an :class:`EBranchformerLayer` or :class:`EBranchformerStack` with the names of
    RETURNN's checkpoints."""
    if isinstance(module, EBranchformerLayer):
        return layer_state_to_returnn(module.state_dict())
    out: dict[str, Tensor] = {}
    if module.input_projection is not None:
        out["input_projection.weight"] = module.input_projection.weight.detach().t().clone()
    for i, layer in enumerate(module.layers):
        out |= {f"layers.{i}.{name}": tensor for name, tensor in to_returnn(layer).items()}
    return out


def _pop(state: dict[str, Tensor], names: dict[str, str]) -> list[tuple[str, Tensor]]:
    return [(new, state.pop(old)) for old, new in names.items() if old in state]


def _swap_halves(tensor: Tensor) -> Tensor:
    return torch.cat(tensor.chunk(2)[::-1])
