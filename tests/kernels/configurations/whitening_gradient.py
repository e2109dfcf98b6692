# SPDX-License-Identifier: Apache-2.0
"""The configurations of kernels/whitening_gradient.py."""

from fastasr.kernels import _jobs, whitening_gradient

from .configuration import DTYPES, Configuration

WIDTHS = (32, 192, 512)  # heads of keys, and channels
KINDS = ("products", "covariance", "norms", "change")
WIDE = ("PRODUCTS", "SUMS", "COUNTS", "SHIFT", "COVARIANCE", "MEAN", "LIMITS", "ACT", "BIAS", "NORMS")


def configurations():
    """The numbers of a recorded pass are on the device, those of others are not. It may have padding."""
    for dtype, torch_dtype in DTYPES.items():
        for width in WIDTHS if dtype != "fp16" else (192,):
            kinds = whitening_gradient.tiles(width, torch_dtype)
            for kind in KINDS:
                labels = ("",)
                if width == 192 and dtype != "fp16":
                    labels = ("", "recorded", "padded") if dtype == "bf16" else ("", "padded")
                for label in labels:
                    yield _configuration(kind, kinds[kind], dtype, width, label)
            for kind in ("products", "covariance"):
                padded = dtype == "bf16" and width == 32
                own = {"FIELDS": 19, "DTYPE": _jobs.TYPES[torch_dtype], "PADDED": padded} | kinds[kind]
                if kind == "covariance":
                    del own["DTYPE"]
                label = f"{width} channels, {'padded, ' if padded else ''}{dtype}"
                kernel = getattr(whitening_gradient, f"{kind}_of_jobs_kernel")
                name = f"whitening_gradient {kind} of jobs, {label}"
                yield Configuration(name, kernel, {"JOBS": "i64"}, own)


def _configuration(kind, tile, dtype, width, label):
    types = dict.fromkeys(WIDE, "fp32") | dict.fromkeys(("X", "GRAD", "CHANGE", "Y"), dtype)
    types |= {"STATISTICS": "fp64", "WHITE": "i1", "HIDDEN": "u8"}
    recorded = label != ""
    absent = () if recorded else ("LIMITS", "ACT")
    absent += () if label == "padded" else ("HIDDEN", "COUNTS")
    name = ", ".join(filter(None, (f"whitening_gradient {kind}", f"{width} channels", label, dtype)))
    kernel, strides = getattr(whitening_gradient, f"{kind}_kernel"), ("width", "x_row", "grad_row", "y_row")
    constants = tile | {"IN_PLACE": recorded} | dict.fromkeys(absent)
    return Configuration(name, kernel, types, constants, strides, ("limit", "grad_scale"))
