# SPDX-License-Identifier: Apache-2.0
"""The configurations of kernels/balancer_gradient.py."""

from fastasr.kernels import _jobs, balancer_gradient

from .configuration import DTYPES, Configuration

STRIDES = ("channels", "inner", "outer_stride", "channel_stride", "x_row", "grad_row", "y_row")
LIMITS = ("min_mean", "max_mean", "min_rms", "max_rms", "grad_scale")
KINDS = {  # inner elements, channels, whether channels are side by side
    "192 channels": (30000, 192, True),
    "8 channels": (2 << 20, 8, True),
    "channels in the middle": (1504, 384, False),
}


def configurations():
    """The numbers of a recorded pass are on the device, those of others are not. It may have padding."""
    yield from _of_jobs()
    for dtype in DTYPES:
        for label, (inner, channels, by_row) in KINDS.items():
            if dtype == "fp16" and label != "192 channels":
                continue
            kinds = {"192 channels": ("", "recorded", "padded"), "8 channels": ("",)}
            for kind in kinds.get(label, ("", "padded")):
                recorded = kind != ""
                sizes = inner, channels, by_row, DTYPES[dtype].itemsize
                block_r, block_c, warps = balancer_gradient.tiles(*sizes)
                own = {"BLOCK_R": block_r, "BLOCK_C": block_c, "num_warps": warps}
                own |= {"channel_stride": 1} if by_row else dict.fromkeys(("x_row", "grad_row", "y_row"), 1)
                own |= {"IN_PLACE": recorded, "BLOCK_P": balancer_gradient.PARTS}
                own |= {} if recorded else {"ACT": None, "LIMITS": None}
                own |= {} if kind == "padded" else {"HIDDEN": None}
                types = dict.fromkeys(("X", "GRAD", "Y"), dtype) | {"HIDDEN": "u8"}
                types |= dict.fromkeys(("TABLE", "LIMITS", "ACT"), "fp32")
                for name in ("sums", "change"):
                    kernel = getattr(balancer_gradient, f"{name}_kernel")
                    name = ", ".join(filter(None, (f"balancer_gradient {name}, {label}", kind, dtype)))
                    yield Configuration(name, kernel, types, own, STRIDES, LIMITS)


def _of_jobs():
    for dtype, padded in (("fp32", False), ("bf16", False), ("bf16", True)):
        block_r, block_c, warps = balancer_gradient.tiles(30000, 192, True, DTYPES[dtype].itemsize)
        own = {"FIELDS": 9, "DTYPE": _jobs.TYPES[DTYPES[dtype]], "PADDED": padded}
        own |= {"BLOCK_R": block_r, "BLOCK_C": block_c, "num_warps": warps}
        name = f"balancer_gradient sums of jobs, {'padded, ' if padded else ''}{dtype}"
        yield Configuration(name, balancer_gradient.sums_of_jobs_kernel, {"JOBS": "i64"}, own)
