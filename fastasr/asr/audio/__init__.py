# SPDX-License-Identifier: Apache-2.0
"""Recordings and their features, which streaming, the training recipe and the demo read."""
