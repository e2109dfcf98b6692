# SPDX-License-Identifier: Apache-2.0
"""The configurations of kernels/whitening_gradient.py."""

from fastasr.kernels import _jobs, whitening_gradient

from .configuration import DTYPES, Configuration

WIDTHS = (32, 192, 512)  # heads of keys, and channels
TENSORS = {
    "products": ("X", "HIDDEN", "ACT", "PRODUCTS", "SUMS", "COUNTS", "SHIFT"),
    "covariance": ("PRODUCTS", "SUMS", "COUNTS", "ACT", "COVARIANCE", "MEAN", "STATISTICS"),
    "norms": (
        "GRAD",
        "HIDDEN",
        "COVARIANCE",
        "MEAN",
        "STATISTICS",
        "LIMITS",
        "ACT",
        "WHITE",
        "CHANGE",
        "BIAS",
        "NORMS",
    ),
    "change": (
        "GRAD",
        "X",
        "HIDDEN",
        "SHIFT",
        "STATISTICS",
        "WHITE",
        "LIMITS",
        "ACT",
        "CHANGE",
        "BIAS",
        "NORMS",
        "Y",
    ),
}


def configurations():
    """The numbers of a recorded pass are on the device, those of others are not. It may have padding."""
    for dtype, torch_dtype in DTYPES.items():
        for width in WIDTHS if dtype != "fp16" else (192,):
            kinds = whitening_gradient.tiles(width, torch_dtype)
            for kind, names in TENSORS.items():
                labels = ("",)
                if width == 192 and dtype != "fp16":
                    labels = ("", "recorded", "padded") if dtype == "bf16" else ("", "padded")
                for label in labels:
                    yield _configuration(kind, names, dict(kinds[kind]), dtype, width, label)
            for kind in ("products", "covariance"):
                padded = dtype == "bf16" and width == 32
                own = {"FIELDS": 19, "DTYPE": _jobs.TYPES[torch_dtype], "PADDED": padded} | kinds[kind]
                warps = own.pop("num_warps")
                if kind == "covariance":
                    del own["DTYPE"]
                label = f"{width} channels, {'padded, ' if padded else ''}{dtype}"
                kernel = getattr(whitening_gradient, f"{kind}_of_jobs_kernel")
                name = f"whitening_gradient {kind} of jobs, {label}"
                yield Configuration(name, kernel, {"JOBS": "i64"}, own, warps)


def _configuration(kind, names, tile, dtype, width, label):
    recorded = label != ""
    own = ("X", "GRAD", "CHANGE", "Y")
    types = {name: dtype if name in own else "fp32" for name in names}
    others = ("STATISTICS", "fp64"), ("WHITE", "i1"), ("HIDDEN", "u8")
    types |= {name: found for name, found in others if name in names}
    warps = tile.pop("num_warps")
    if not recorded:
        tile |= {name: None for name in ("LIMITS", "ACT") if name in names}
    if label != "padded":
        tile |= {name: None for name in ("HIDDEN", "COUNTS") if name in names}
    if kind == "change":
        tile["IN_PLACE"] = recorded
    divisible = tuple(n for n in ("width", "x_row", "grad_row", "y_row") if n in _names(kind))
    floats = tuple(n for n in ("limit", "grad_scale") if n in _names(kind))
    name = ", ".join(filter(None, (f"whitening_gradient {kind}", f"{width} channels", label, dtype)))
    return Configuration(name, _kernel(kind), types, tile, warps, divisible, floats)


def _kernel(kind):
    return getattr(whitening_gradient, f"{kind}_kernel")


def _names(kind):
    return _kernel(kind).arg_names
