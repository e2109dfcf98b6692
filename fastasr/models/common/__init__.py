# SPDX-License-Identifier: Apache-2.0
"""What several model families share: calls of plain submodules, inference conditions and weights packed for native
calls."""
