# SPDX-License-Identifier: Apache-2.0
"""``python -m fastasr.cli``: the command without its entry point."""

from fastasr.cli import main

if __name__ == "__main__":
    main()
