# SPDX-License-Identifier: Apache-2.0
"""Forward passes for the modules of other packages' Conformers (Gulati et al., "Conformer", 2020), which the swap binds
to them: a file per package. A Conformer of fastasr's own is :mod:`fastasr.models.fast_conformer`."""
