# SPDX-License-Identifier: Apache-2.0
"""What a processor makes of onnxruntime's int8."""

import platform
from pathlib import Path


def saturates():
    """Says whether onnxruntime adds two int8 products in 16 bits, which saturate: on x86 without VNNI."""
    return platform.machine() == "x86_64" and "vnni" not in Path("/proc/cpuinfo").read_text()
