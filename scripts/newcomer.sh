#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# newcomer.sh WHEEL PYTHON: shows the seconds from nothing to a swapped model. PYTHON is an interpreter with torch and
# upstream's package zipformer; the fresh environment sees its packages and gets the wheel alone. Nothing is downloaded, and
# the environment of PYTHON stays as it is.
set -euo pipefail
wheel=$(realpath "$1") python=$(realpath -s "$(command -v "$2")")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
begin=$(date +%s%N)
done_with() { printf '%6.1f s  %s\n' "$((($(date +%s%N) - begin) / 100000000))e-1" "$1"; }

packages=$("$python" -c "import torch; print(torch.__path__[0].rpartition('/')[0])")
begin=$(date +%s%N)
"$python" -m venv new
echo "$packages" >"$(echo new/lib/python*/site-packages)/torch-of-another.pth"
done_with "a fresh environment that sees torch"
new/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-index "$wheel"
done_with "pip install $(basename "$wheel")"
new/bin/python - <<'PYTHON'
import fastasr, torch
from zipformer.modules.zipformer import Zipformer  # upstream's model, from PyPI

sizes = {"encoder_dim": (64, 96), "encoder_unmasked_dim": (48, 64), "downsampling_factor": (1, 2)}
model = Zipformer(**sizes, num_encoder_layers=1).eval()
report = fastasr.accelerate(model)
model(torch.randn(100, 1, 64), torch.tensor([100]))
print(f"          {len(report.replaced)} modules replaced in {type(model).__name__}, fastasr {fastasr.__version__}")
assert report.replaced
PYTHON
done_with "a swapped model that has run"
