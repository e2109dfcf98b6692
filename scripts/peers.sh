# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=bash
# What pip installs for each framework, beside a torch that stays. docs/install.md shows these lines by
# scripts/tables.py, and scripts/install_peers.sh runs them.

# transformers
pip install transformers

# RETURNN
pip install returnn dm-tree

# torchaudio: 2.11.1 needs torch 2.13. Without CUDA in torch its libraries do not load, and what fastasr swaps needs none
pip install --no-deps "torchaudio==2.11.$(python -c 'import torch; print(int(torch.__version__ >= "2.13"))')"
python -c "import torch; raise SystemExit(torch.version.cuda is None)" ||
  rm -f "$(python -c "import sysconfig; print(sysconfig.get_path('platlib'))")"/torchaudio/lib/*.so

# SpeechBrain, after torchaudio
pip install speechbrain==1.1.2

# ESPnet's encoders and decoders; by itself, ESPnet asks for another torch
pip install typeguard packaging numpy
pip install --no-deps espnet==202511

# zipformer, the PyPI package, after torchaudio; by itself, it asks for torch 2.7, and version 0.1.2 has other code
pip install tensorboard kaldialign soundfile braceexpand pyyaml tqdm
pip install --no-deps zipformer==0.1.3 atdataset webdataset kaldifst

# the encoders of FireRedASR and GigaAM; recognition needs what the packages ask for, and GigaAM asks for torch 2.5
pip install --no-deps fireredasr==0.0.2 gigaam==0.1.0

# the encoders of FunASR, likewise
pip install --no-deps funasr==1.4.16

# openai-whisper's model; transcription needs what the package asks for
pip install --no-deps openai-whisper==20250625

# NeMo
pip install "nemo_toolkit[asr]==3.0.0"
