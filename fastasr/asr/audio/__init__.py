# SPDX-License-Identifier: Apache-2.0
"""Recordings and their features: what streaming, the training recipe and the demo read speech with."""
