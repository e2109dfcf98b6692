# SPDX-License-Identifier: Apache-2.0
"""Self-attention with relative positions, which :func:`fastasr.ops.rel_attention` computes without its weights.

Each forward runs upstream's code for what the op does not compute: weights that are asked for, other masks, dropout
that is drawn as upstream does, position embeddings of each sequence's own.
"""

import torch

from fastasr import ops
from fastasr.models.common import attention_dropout, plumbing
from fastasr.models.fast_conformer import masks
from fastasr.models.fast_conformer.attention import STANDARD, projected
from fastasr.models.fast_conformer.masks import is_readable, seen


def wav2vec2_attention(self, hidden_states, attention_mask=None, relative_position_embeddings=None, **kwargs):
    """transformers' Wav2Vec2Conformer. hidden states (B, T, width), attention mask (bool (B, 1, T, T), True: the query
    sees the key) or None, position embeddings (1, 2T − 1, width) -> ((B, T, width), None)."""
    batch, frames = hidden_states.shape[:2]
    implementation = self.config._attn_implementation
    fits = (
        implementation in STANDARD
        and not (implementation == "eager" and plumbing.is_watched(self))
        and is_readable(attention_mask, batch, frames)
        and _is_one_table(relative_position_embeddings, frames)
    )
    by = seen(attention_mask) if fits and attention_mask is not None else None
    if fits and (by is None or by.empty_rows is None):
        y = _attention(self, hidden_states, relative_position_embeddings, masks.of_kernel(attention_mask, by))
        if y is not None:
            return y, None
    return type(self).forward(self, hidden_states, attention_mask, relative_position_embeddings, **kwargs)


def fastspeech2_attention(self, hidden_states, attention_mask=None, pos_emb=None, output_attentions=False):
    """transformers' FastSpeech2Conformer. hidden states (B, T, width), attention mask (B, 1, T) that is 0 at hidden
    keys or None, position embeddings (1, 2T − 1, width) -> ((B, T, width), None)."""
    batch, frames = hidden_states.shape[:2]
    if (
        not output_attentions
        and _is_one_table(pos_emb, frames)
        and (attention_mask is None or attention_mask.shape == (batch, 1, frames))
    ):
        hidden = {} if attention_mask is None else {"key_padding_mask": attention_mask[:, 0].eq(0)}
        y = _attention(self, hidden_states, pos_emb, hidden)
        if y is not None:
            return y, None
    return type(self).forward(self, hidden_states, attention_mask, pos_emb, output_attentions)


def speechbrain_attention(
    self, query, key, value, pos_embs, key_padding_mask=None, attn_mask=None, return_attn_weights=True
):
    """SpeechBrain's RelPosMHAXL, whose scores are divided by √width. query, which is key and value too, (B, T, width),
    position embeddings (1, 2T − 1, width), masks bool (B, T) and (T, T), True at hidden keys, or None -> (B, T, width),
    and None for the weights if they are asked for."""
    batch, frames = query.shape[:2]
    given = {
        "key_padding_mask": (key_padding_mask, (batch, frames)),
        "attn_mask": (attn_mask, (frames, frames)),
    }
    given = {name: pair for name, pair in given.items() if pair[0] is not None}
    fits = query is key is value and _is_one_table(pos_embs, frames)
    fits = fits and all(mask.dtype == torch.bool and mask.shape == shape for mask, shape in given.values())
    share = plumbing.dropped_share(self.dropout_att)
    dropout = attention_dropout.of_kernel(share, query.device) if fits else None
    if dropout is None:
        return type(self).forward(
            self, query, key, value, pos_embs, key_padding_mask, attn_mask, return_attn_weights
        )
    heads, scale = self.num_heads, self.num_heads**-0.5
    u, w = (bias.view(heads, self.head_dim) * scale for bias in (self.pos_bias_u, self.pos_bias_v))
    q, k, v = ops.linear(query, self.in_proj_weight).view(batch, frames, heads, -1).chunk(3, -1)
    if self.vbias is not None:
        v = v + self.value_bias_weight.view(heads, self.vhead_dim)
    p = projected(self, self.linear_pos, pos_embs[0]).view(-1, heads, self.head_dim)
    hidden = {name: mask for name, (mask, _) in given.items()}
    y = ops.rel_attention(q * scale, k, v, p, u, w, **hidden, **dropout)
    out = plumbing.linear(self.out_proj, y.flatten(2))
    return (out, None) if return_attn_weights else out


def _is_one_table(positions, frames):
    return positions is not None and positions.ndim == 3 and positions.shape[:2] == (1, 2 * frames - 1)


def _attention(module, x, positions, hidden):
    """Returns the attention of modules with ESPnet's names; None where upstream must draw the dropout."""
    dropout = attention_dropout.of_kernel(plumbing.dropped_share(module.dropout), x.device)
    if dropout is None:
        return None
    shape = *x.shape[:2], *module.pos_bias_u.shape
    q, k, v = (
        plumbing.linear(layer, x).view(shape) for layer in (module.linear_q, module.linear_k, module.linear_v)
    )
    p = projected(module, module.linear_pos, positions[0]).view(-1, *module.pos_bias_u.shape)
    y = ops.rel_attention(q, k, v, p, module.pos_bias_u, module.pos_bias_v, **hidden, **dropout)
    return plumbing.linear(module.linear_out, y.flatten(2))
