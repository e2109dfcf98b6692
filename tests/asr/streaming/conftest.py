# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from steps import moved, seeded

from fastasr.asr import recogniser
from fastasr.models import zipformer

BINS, CHUNK, LEFT = 80, 8, 16
CONFIG = {
    "feature_dim": BINS,
    "downsampling_factor": "1,2,4,2",
    "encoder_dim": "24,32,48,32",
    "num_encoder_layers": "1,1,1,1",
    "encoder_unmasked_dim": "24,24,32,24",
    "query_head_dim": "8",
    "pos_head_dim": "4",
    "value_head_dim": "6",
    "num_heads": "2,2,4,2",
    "feedforward_dim": "32,48,64,48",
    "cnn_module_kernel": "9,7,5,7",
    "pos_dim": 16,
    "vocab_size": 12,
    "decoder_dim": 16,
    "joiner_dim": 20,
    "use_ctc": True,
    "causal": True,
    "chunk_size": "8,16,-1",
    "left_context_frames": "16,32",
}


@pytest.fixture(scope="session")
def model():
    """Returns a model with no parameter at its initial 0 or 0.5, and tokens about as likely as blank."""
    seeded(0)
    made = moved(recogniser.AsrModel(**CONFIG), 0.05)
    with torch.no_grad():
        for p in (made.joiner.output_linear.weight, made.ctc_output[1].weight):
            p.normal_()
    return made.eval()


@pytest.fixture(scope="session")
def upstream_model(model):
    """Returns the PyPI package's encoder and front end with the same weights, its Swoosh functions not compiled."""
    pytest.importorskip("zipformer", exc_type=ImportError)
    from zipformer.modules.subsampling import Conv2dSubsampling
    from zipformer.modules.zipformer import Zipformer

    made = torch.nn.Module()
    names = set(zipformer.Zipformer.__init__.__code__.co_varnames)
    options = {
        name: tuple(int(part) for part in value.split(",")) if isinstance(value, str) else value
        for name, value in CONFIG.items()
        if name in names
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("K2_ONNX_EXPORT", "1")
        made.encoder_embed = Conv2dSubsampling(BINS, 24)
        made.encoder = Zipformer(**options)
    made.encoder.load_state_dict(model.encoder.state_dict())
    made.encoder_embed.load_state_dict(model.encoder_embed.state_dict())
    return made.eval()
