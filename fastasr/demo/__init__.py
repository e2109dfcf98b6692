# SPDX-License-Identifier: Apache-2.0
"""The demo: ``python -m fastasr.demo`` accelerates upstream's Zipformer-M on real speech (extra ``demo``).

Random weights: what is shown is that the swapped model computes what upstream's computes, and how fast, not
what is said. ``run`` goes through the stages, ``stages`` says what is going on, ``story`` holds what was found out and
``report`` makes the HTML page of it.
"""
