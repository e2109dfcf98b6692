#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# install_peers.sh PYTHON [NAME...]: the upstream packages that parity tests and benchmarks compare with. PYTHON has torch.
# NAMEs choose paragraphs of peers.sh; without any, everything is installed.
set -euo pipefail
python=$1
shift
here=$(cd "$(dirname "$0")" && pwd)

python() { "$python" "$@"; }
pip() {
  local options=(--quiet --disable-pip-version-check -c "$here/constraints.txt")
  # The tests import NeMo's encoder without the 130 packages that NeMo needs for training and data.
  [[ $* == *nemo_toolkit* ]] && options+=(--no-deps)
  "$python" -m pip "$@" "${options[@]}"
}

for name in "$@"; do
  source <(awk -v RS= -v head="^# $name[:,]" '$0 ~ head' "$here/peers.sh")
done
[[ $# == 0 ]] || exit 0

# Tests also need ONNX, adapters and the tables of byte-level units.
pip install onnx onnxruntime onnxscript sentencepiece simple-sentencepiece soxr
pip install --no-deps accelerate loralib
# The lines that docs/install.md shows.
source "$here/peers.sh"

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
