# SPDX-License-Identifier: Apache-2.0
"""Code that several model families share: calls of plain submodules, inference conditions and weights packed for
native calls."""
