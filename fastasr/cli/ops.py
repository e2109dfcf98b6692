# SPDX-License-Identifier: Apache-2.0
"""``fastasr ops`` lists for every op and backend whether it is available, and why not."""

import json

import fastasr  # noqa: F401 - registers the ops
from fastasr.cli.console import escape, mark, out, table
from fastasr.ops import _dispatch


def run(as_json: bool) -> None:
    rows = _dispatch.table()
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    shown = table("op", "backend", "available", "devices", "dtypes", "reason")
    previous = None
    for row in rows:
        name = "" if row["op"] == previous else row["op"]
        previous = row["op"]
        shown.add_row(
            escape(name),
            row["backend"],
            mark(row["available"]),
            escape(", ".join(row["devices"])),
            escape(", ".join(row["dtypes"])),
            escape(row["reason"]),
        )
    out().print(shown)
