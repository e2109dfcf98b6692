# SPDX-License-Identifier: Apache-2.0
"""``fastasr export`` writes the ONNX files of the recogniser that a user's function returns."""

import json
from pathlib import Path

import torch

import fastasr
from fastasr.cli.console import escape, fail, out, table
from fastasr.cli.swap import call, load


def run(reference: str, folder: Path, *, suffix: str, int8: bool, reduce_range: bool, as_json: bool) -> None:
    from fastasr.asr.export import export_onnx

    model = call(load(reference, "MODULE:FACTORY"), "MODULE:FACTORY", reference)
    if not isinstance(model, torch.nn.Module):
        fail(f"{reference}() returned a {type(model).__name__}, not a torch.nn.Module")
    try:
        with fastasr.eager_mode(model):
            files = export_onnx(model, folder, suffix=suffix, int8=int8, reduce_range=reduce_range)
    except (ValueError, ImportError, OSError) as error:
        fail(str(error))
    sizes = {name: (str(path), path.stat().st_size) for name, path in files.items()}
    if as_json:
        print(json.dumps({name: {"file": path, "bytes": size} for name, (path, size) in sizes.items()}))
        return
    listed = table("part", "file", "MB")
    for name, (path, size) in sizes.items():
        listed.add_row(name, escape(path), f"{size / 1e6:.1f}")
    out().print(listed)
