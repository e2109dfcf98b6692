# SPDX-License-Identifier: Apache-2.0
"""Samples of swoosh_r."""

from dataclasses import replace

from fastasr.testing.samples import swoosh_l

TABLE = replace(swoosh_l.TABLE, op="swoosh_r", definition=None)
