# SPDX-License-Identifier: Apache-2.0
"""Writes the files that run: ``fastasr/ops/_written/<op>.py`` from the declaration in ``fastasr/ops``."""
