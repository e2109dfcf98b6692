# SPDX-License-Identifier: Apache-2.0
"""One sample table per op."""
