# SPDX-License-Identifier: Apache-2.0
"""Other packages' names, so that code written for them runs without them: k2, torchaudio's RNN-T loss, the transducer
losses of transformers, NeMo and warp-rnnt.
"""
