#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# install_peers.sh PYTHON: the upstream packages that parity tests and benchmarks compare with. PYTHON has torch.
set -euo pipefail
python=$1
here=$(cd "$(dirname "$0")" && pwd)
pip=("$python" -m pip install --quiet --disable-pip-version-check -c "$here/constraints.txt")

# What `import zipformer` imports, and what its ONNX export needs.
"${pip[@]}" tensorboard huggingface_hub tqdm pandas braceexpand kaldialign sentencepiece simple-sentencepiece \
  packaging pyyaml onnx onnxruntime onnxscript typeguard
# Without their dependencies: these ask for torch packages of their own.
"${pip[@]}" --no-deps kaldifst webdataset atdataset zipformer torchaudio espnet

# torchaudio's wheels are linked against CUDA: with a CPU torch their libraries do not load and the import fails.
# Its Python parts (torchaudio.models, compliance) need none of them, so the libraries go.
"$python" - <<'PY'
import importlib.util
import pathlib

import torch

if torch.version.cuda is None:
    package = pathlib.Path(importlib.util.find_spec("torchaudio").origin).parent
    for library in package.rglob("*.so"):
        library.unlink()
PY

"$python" - <<'PY'
import torchaudio
from espnet2.asr_transducer.decoder.mega_decoder import MEGADecoder  # noqa: F401
from zipformer.modules.zipformer import Zipformer  # noqa: F401

print("upstream packages: espnet, zipformer, torchaudio", torchaudio.__version__)
PY
