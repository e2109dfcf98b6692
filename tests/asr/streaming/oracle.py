# SPDX-License-Identifier: Apache-2.0
"""One stream alone, by the model's own streaming_forward."""

import torch

from fastasr.asr.streaming.backend import streaming_wrapper


class Alone:
    """One stream of ``model``: ``step`` takes one chunk (frames, bins)."""

    def __init__(self, model, chunk_size, left_context_frames):
        self.wrapper = streaming_wrapper(model, chunk_size, left_context_frames)
        self.reset()

    def reset(self):
        self.states = self.wrapper.get_init_states(1)

    @torch.inference_mode()
    def step(self, chunk):
        y, _, self.states = self.wrapper(chunk.unsqueeze(0), torch.tensor([len(chunk)]), self.states)
        return y[0]
