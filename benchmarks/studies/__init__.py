# SPDX-License-Identifier: Apache-2.0
"""Programs that measure, draw or check for the repository's own pages and rows. They need a checkout: wheels leave them
out.
"""
