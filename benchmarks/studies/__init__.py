# SPDX-License-Identifier: Apache-2.0
"""What measures, draws or checks for the repository's own pages and rows. It needs a checkout: wheels leave it out."""
