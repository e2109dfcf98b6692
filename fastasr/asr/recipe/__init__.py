# SPDX-License-Identifier: Apache-2.0
"""The parts of ``examples/train_transducer.py`` and ``examples/transcribe.py`` (extra ``recipe``).

``speech``: recordings, transcripts, features. ``units``: tokens of a text. ``batches``: utterances by duration.
``sizes``: the models. ``transducers``: models with other encoders than the Zipformer. ``scaled_adam``, ``eden``: the
optimizer and its learning rate. ``parallel``: DDP and FSDP2. ``checkpoints``: atomic files. ``training``: the loop.
``scoring``: error rates. ``curves``: pictures of losses. ``recogniser``: transcription with a trained model or its ONNX
files. See docs/training.md.
"""
