# SPDX-License-Identifier: Apache-2.0
"""The demo: ``python -m fastasr.demo`` accelerates upstream's Zipformer-M on real speech (extra ``demo``).

Random weights: what is shown is that the swapped model computes what upstream's computes, and how fast, not
what is said. ``audio`` fetches or makes the speech, ``features`` turns it into fbank, ``stages`` tells what
is going on, ``run`` is the story, ``report`` the HTML page.
"""
