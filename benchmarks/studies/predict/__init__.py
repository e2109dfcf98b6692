# SPDX-License-Identifier: Apache-2.0
"""``python -m fastasr.benchmarks.studies.predict``: times of the ops on GPUs, predicted from the compiled kernels."""
