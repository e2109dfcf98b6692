# SPDX-License-Identifier: Apache-2.0
"""Model classes: upstream's constructors, attribute names and state dicts, on fastasr's ops.

The swap binds the ``forward`` of these classes to instances of upstream's classes, so every ``forward`` here
reads only attributes that upstream's class has under the same name.
"""
