# SPDX-License-Identifier: Apache-2.0
"""The demo: ``python -m fastasr.asr.demo`` accelerates upstream's Zipformer-M on real speech (extra ``demo``).

The model has random weights: the demo shows that the swapped model computes the same as upstream's, and how fast, but
does not transcribe. ``run`` goes through the stages, ``stages`` prints the progress, ``story`` holds the results and
``report`` makes an HTML page of them.
"""
