# SPDX-License-Identifier: Apache-2.0
"""Public functions that do more than the op of their name: ``fastasr.ops.<name>`` is the one here if there is one."""
