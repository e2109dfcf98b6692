# SPDX-License-Identifier: Apache-2.0
"""The ops as they run. `make ops` writes these files."""
