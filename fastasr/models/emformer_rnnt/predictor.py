# SPDX-License-Identifier: Apache-2.0
"""The prediction network: embedding, LayerNorm, LSTMs, a linear layer, LayerNorm."""

from typing import Any

import torch
from torch import Tensor, nn

from fastasr import _left, ops
from fastasr.models.common import plumbing

State = list[list[Tensor]]


class CustomLSTM(nn.Module):
    """An LSTM layer. With ``layer_norm=True`` it normalises gates and cell and has no biases.

    ``forward(input (T, B, D), state)`` returns y (T, B, H) and the state after the last step. state is None or
    [hidden, cell], (B, H) each.
    """

    c_norm: nn.Module
    g_norm: nn.Module

    def __init__(
        self, input_dim: int, hidden_dim: int, layer_norm: bool = False, layer_norm_epsilon: float = 1e-5
    ) -> None:
        super().__init__()
        self.x2g = nn.Linear(input_dim, 4 * hidden_dim, bias=not layer_norm)
        self.p2g = nn.Linear(hidden_dim, 4 * hidden_dim, bias=False)
        if layer_norm:
            self.c_norm = nn.LayerNorm(hidden_dim, eps=layer_norm_epsilon)
            self.g_norm = nn.LayerNorm(4 * hidden_dim, eps=layer_norm_epsilon)
        else:
            self.c_norm = nn.Identity()
            self.g_norm = nn.Identity()
        self.hidden_dim = hidden_dim

    def forward(self, input: Tensor, state: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        hidden, cell = (None, None) if state is None else state
        x2g, p2g = self.x2g, self.p2g
        gates: Any = self.g_norm
        cells: Any = self.c_norm
        if reason := _why_by_steps(x2g, p2g, gates, cells):
            _left.note(self, f"it runs step by step: {reason}")
            return _by_steps(self, input, hidden, cell)
        if type(gates) is nn.Identity:
            y, state = _plain_lstm(input, x2g, p2g, hidden, cell)
        else:
            norms = gates.weight, gates.bias, cells.weight, cells.bias
            y, *state = ops.layer_norm_lstm(input, x2g.weight, p2g.weight, *norms, hidden, cell, gates.eps)
        # The backward pass reads y, and upstream's may be changed: by a dropout in place, for example.
        return y.clone() if y.requires_grad else y, state


def why_by_steps(lstm: "CustomLSTM") -> str:
    """Returns why this LSTM layer calls its submodules step by step, or ""."""
    return _why_by_steps(lstm.x2g, lstm.p2g, lstm.g_norm, lstm.c_norm)


def _why_by_steps(x2g: nn.Module, p2g: nn.Module, gates: nn.Module, cells: nn.Module) -> str:
    for name, product in (("x2g", x2g), ("p2g", p2g)):
        if not plumbing.is_plain_linear(product):
            return f"{name} has hooks, another forward or another class than Linear"
    if p2g.bias is not None:
        return "p2g has a bias"
    if type(gates) is type(cells) is nn.Identity:
        return "" if x2g.bias is not None else "x2g has no bias, and nothing is normalised"
    for name, norm in (("g_norm", gates), ("c_norm", cells)):
        if not plumbing.is_layer_norm(norm):
            return f"{name} has hooks, another forward, no bias or another class than LayerNorm"
    if x2g.bias is not None:
        return "x2g has a bias before a norm"
    return "" if gates.eps == cells.eps else "g_norm and c_norm differ in eps"


def _plain_lstm(
    x: Tensor, x2g: nn.Linear, p2g: nn.Linear, hidden: Tensor | None, cell: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """Runs torch's LSTM, which has the same order of gates; one of its two biases is 0."""
    zeros = x.new_zeros(x.shape[1], p2g.weight.shape[1])
    state = [(zeros if t is None else t).unsqueeze(0) for t in (hidden, cell)]
    weights = [x2g.weight, p2g.weight, x2g.bias, torch.zeros_like(x2g.bias)]
    y, hidden, cell = torch.lstm(x, state, weights, True, 1, 0.0, False, False, False)
    return y, [hidden[0], cell[0]]


def _by_steps(
    lstm: "CustomLSTM", x: Tensor, h: Tensor | None, c: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """Calls the submodules step by step, see ``why_by_steps``."""
    zeros = x.new_zeros(x.shape[1], lstm.hidden_dim)
    h, c = (zeros if t is None else t for t in (h, c))
    steps = []
    for product in lstm.x2g(x).unbind(0):
        i, f, v, o = lstm.g_norm(product + lstm.p2g(h)).chunk(4, 1)
        c = lstm.c_norm(f.sigmoid() * c + i.sigmoid() * v.tanh())
        h = o.sigmoid() * c.tanh()
        steps.append(h)
    return torch.stack(steps), [h, c]


class Predictor(nn.Module):
    """Labels (B, U) to encodings (B, U, output_dim).

    Args:
        num_symbols: number of labels, the blank included. output_dim: channels of the encodings.
        symbol_embedding_dim: channels of a label's embedding.
        num_lstm_layers, lstm_hidden_dim: number of LSTM layers and their units.
        lstm_layer_norm: whether gates and cells are normalised; lstm_layer_norm_epsilon: added to their variances.
        lstm_dropout: rate of the dropout after each LSTM layer.
    """

    def __init__(
        self,
        num_symbols: int,
        output_dim: int,
        symbol_embedding_dim: int,
        num_lstm_layers: int,
        lstm_hidden_dim: int,
        lstm_layer_norm: bool = False,
        lstm_layer_norm_epsilon: float = 1e-5,
        lstm_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_symbols, symbol_embedding_dim)
        self.input_layer_norm = nn.LayerNorm(symbol_embedding_dim)
        self.lstm_layers = nn.ModuleList(
            CustomLSTM(
                symbol_embedding_dim if i == 0 else lstm_hidden_dim,
                lstm_hidden_dim,
                layer_norm=lstm_layer_norm,
                layer_norm_epsilon=lstm_layer_norm_epsilon,
            )
            for i in range(num_lstm_layers)
        )
        self.dropout = nn.Dropout(p=lstm_dropout)
        self.linear = nn.Linear(lstm_hidden_dim, output_dim)
        self.output_layer_norm = nn.LayerNorm(output_dim)
        self.lstm_dropout = lstm_dropout

    def forward(
        self, input: Tensor, lengths: Tensor, state: State | None = None
    ) -> tuple[Tensor, Tensor, State]:
        """input (B, U), lengths (B,), state -> encodings (B, U, output_dim), lengths, the state after the last label.

        state is a list with [hidden, cell] of every layer, or None.
        """
        x = self.input_layer_norm(self.embedding(input.t()))
        states = []
        for i, lstm in enumerate(self.lstm_layers):
            x, after = lstm(x, None if state is None else state[i])
            x = plumbing.dropout(self.dropout, x)
            states.append(after)
        x = self.output_layer_norm(plumbing.linear(self.linear, x))
        return x.transpose(0, 1), lengths, states
