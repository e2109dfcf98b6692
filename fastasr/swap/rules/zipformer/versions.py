# SPDX-License-Identifier: Apache-2.0
"""The known versions of upstream's code, which the rules share, and the functions of a streaming module."""

from collections.abc import Callable

from fastasr.swap.rule import Known, Upstream, own_forward, upstream_class

PACKAGE = Known("zipformer 0.1.3")  # on PyPI
ICEFALL = Known("icefall's zipformer")  # egs/*/*/zipformer
ZIPVOICE = Known("ZipVoice")  # k2-fsa/ZipVoice at 2f7326f, zipvoice/models/modules
BOTH = Known("zipformer 0.1.3 and icefall's zipformer")

# Our convolution module does not call the identities, nor in inference the second balancer and the whitening.
IDENTITIES = {
    "e87203451183b502ecc10090",  # zipformer 0.1.3, and icefall since pull request 1108
    "b84fe666b5dfd19e547474b5",  # icefall before it, and its zipformer_prompt_asr
}


def forward_and_streaming(module: Upstream) -> list[Callable]:
    streaming = getattr(upstream_class(module), "streaming_forward", None)
    return own_forward(module) + ([streaming] if streaming else [])
