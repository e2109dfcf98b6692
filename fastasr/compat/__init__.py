# SPDX-License-Identifier: Apache-2.0
"""Other packages' names, so that code written for them runs without them: ``fastasr.compat.k2``."""
