#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# install_peers.sh PYTHON: the upstream packages that parity tests and benchmarks compare with. PYTHON has torch.
set -euo pipefail
python=$1
here=$(cd "$(dirname "$0")" && pwd)
pip=("$python" -m pip install --quiet --disable-pip-version-check -c "$here/constraints.txt")

# What `import zipformer` and `import speechbrain` import, and what the ONNX export needs.
"${pip[@]}" tensorboard huggingface_hub tqdm pandas braceexpand kaldialign sentencepiece simple-sentencepiece \
  packaging pyyaml hyperpyyaml scipy onnx onnxruntime onnxscript typeguard attrs wrapt regex safetensors tokenizers soxr
# Without their dependencies: these ask for torch packages of their own.
"${pip[@]}" --no-deps kaldifst webdataset atdataset zipformer torchaudio espnet returnn dm-tree \
  transformers accelerate speechbrain nemo_toolkit loralib

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

# fast_rnnt comes as sources; where they do not compile, the tests that compare with it are skipped and say so.
sources=$(mktemp -d)
trap 'rm -rf "$sources"' EXIT
if ! { "$python" -m pip download --quiet --disable-pip-version-check --no-deps --no-build-isolation \
  --no-binary :all: -d "$sources" fast_rnnt==1.3 &&
  tar -xzf "$sources"/fast_rnnt-*.tar.gz -C "$sources" --strip-components=1 &&
  "$python" "$here/build_fast_rnnt.py" "$sources" >"$sources/log" 2>&1; }; then
  echo "fast_rnnt could not be built:" >&2
  tail -n 5 "$sources/log" >&2 2>/dev/null || true
fi

"$python" - <<'PY'
import speechbrain
import torchaudio
import transformers
from espnet2.asr_transducer.decoder.mega_decoder import MEGADecoder  # noqa: F401
from returnn.frontend.encoder.e_branchformer import EBranchformerLayer  # noqa: F401
from zipformer.modules.zipformer import Zipformer  # noqa: F401

print("upstream packages: espnet, returnn, zipformer, torchaudio", torchaudio.__version__, end=", ")
print("transformers", transformers.__version__, "speechbrain", speechbrain.__version__)
PY
