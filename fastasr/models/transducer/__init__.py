# SPDX-License-Identifier: Apache-2.0
"""Transducers behind an encoder, as rules need them: the loss of icefall's models, and greedy search natively.

``transducer_loss``: the loss without the joiner's logits. ``label_looping``: greedy search over a batch.
``predictors``: the models that it knows. ``parakeet_steps``: the search as transformers' ``generate`` does it.
"""
