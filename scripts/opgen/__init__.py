# SPDX-License-Identifier: Apache-2.0
"""Writes the files that run, ``fastasr/ops/_written/<op>.py`` and ``csrc/bindings/written/<op>.h``, from the
declarations in ``fastasr/ops``.
"""
