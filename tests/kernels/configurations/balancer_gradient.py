# SPDX-License-Identifier: Apache-2.0
"""The configurations of kernels/balancer_gradient.py."""

from fastasr.kernels import _jobs, balancer_gradient

from .configuration import DTYPES, Configuration

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
                block_r, block_c, warps = balancer_gradient.tiles(
                    inner, channels, by_row, DTYPES[dtype].itemsize
                )
                own = {"BLOCK_R": block_r, "BLOCK_C": block_c} | ({"channel_stride": 1} if by_row else {})
                own |= {} if by_row else {"x_row": 1}
                types = {
                    "X": dtype,
                    "TABLE": "fp32",
                    "GRAD": dtype,
                    "Y": dtype,
                    "LIMITS": "fp32",
                    "ACT": "fp32",
                    "HIDDEN": "u8",
                }
                strides = (
                    "channels",
                    "inner",
                    "x_row",
                    "outer_stride",
                    "channel_stride",
                    "grad_row",
                    "y_row",
                )
                name = ", ".join(filter(None, (label, kind, dtype)))
                given = {} if recorded else {"ACT": None}
                given |= {} if kind == "padded" else {"HIDDEN": None}
                yield Configuration(
                    f"balancer_gradient sums, {name}",
                    balancer_gradient.sums_kernel, types, own | given, warps, _of(strides, "sums", own),
                )  # fmt: skip
                given |= {} if recorded else {"LIMITS": None}
                own |= {"IN_PLACE": recorded, "BLOCK_P": balancer_gradient.PARTS}
                own |= {} if by_row else {"grad_row": 1, "y_row": 1}
                yield Configuration(
                    f"balancer_gradient change, {name}", balancer_gradient.change_kernel, types, own | given, warps,
                    _of(strides, "change", own), LIMITS,
                )  # fmt: skip


def _of(names, kind, constants):
    kernel = getattr(balancer_gradient, f"{kind}_kernel")
    return tuple(name for name in names if name in kernel.arg_names and name not in constants)


def _of_jobs():
    for dtype, padded in (("fp32", False), ("bf16", False), ("bf16", True)):
        block_r, block_c, warps = balancer_gradient.tiles(30000, 192, True, DTYPES[dtype].itemsize)
        own = {"FIELDS": 9, "DTYPE": _jobs.TYPES[DTYPES[dtype]], "PADDED": padded}
        own |= {"BLOCK_R": block_r, "BLOCK_C": block_c}
        name = f"balancer_gradient sums of jobs, {'padded, ' if padded else ''}{dtype}"
        yield Configuration(name, balancer_gradient.sums_of_jobs_kernel, {"JOBS": "i64"}, own, warps)
