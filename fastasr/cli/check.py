# SPDX-License-Identifier: Apache-2.0
"""``fastasr check``: values against float64 and gradients of every op, on this machine."""
