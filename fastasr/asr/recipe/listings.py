# SPDX-License-Identifier: Apache-2.0
"""Lists of recordings with their transcripts: a folder with .txt files, a manifest, a data set of Hugging Face.

A manifest is a table with a row of names (.tsv, .csv), or has a JSON object per line (.json, .jsonl), as NeMo's have.
PATHS, TEXTS and SPEAKERS are the names that it may give to its columns. Paths are relative to the manifest, or to the
folder clips beside it, as in Common Voice. A folder of Hugging Face's has such tables, called metadata.
"""

import csv
import json
import math
from dataclasses import dataclass
from pathlib import Path

from fastasr.asr.audio.recordings import SUFFIXES

PATHS = ("audio_filepath", "file_name", "path", "audio", "file")
TEXTS = ("text", "transcription", "transcript", "sentence", "normalized_text")
SPEAKERS = ("speaker", "speaker_id", "client_id")
MANIFESTS = (".tsv", ".csv", ".json", ".jsonl")


class NoSpeech(ValueError):
    """Raised if there are no recordings to train with; the message gives the reason."""


@dataclass
class Entry:
    """A recording, or the part of a file that lasts ``seconds`` from ``begin``. Unknown texts and speakers are ""."""

    path: Path
    name: str
    text: str
    speaker: str = ""
    begin: float = 0.0
    seconds: float | None = None


def entries(source: Path) -> list[Entry]:
    """Returns the recordings of a folder or a manifest. Raises NoSpeech if there are none, ValueError if a manifest
    cannot be read."""
    if source.is_file():
        return _of_manifest(source)
    if not source.is_dir():
        raise NoSpeech(f"{source} is no folder and no manifest")
    manifests = sorted(p for p in source.rglob("metadata.*") if p.suffix in MANIFESTS)
    if manifests:
        return [entry for manifest in manifests for entry in _of_manifest(manifest)]
    found = []
    for path in sorted(p for p in source.rglob("*") if p.suffix.lower() in SUFFIXES):
        words = path.with_suffix(".txt")
        text = words.read_text(encoding="utf-8").strip() if words.exists() else ""
        found.append(Entry(path, path.relative_to(source).with_suffix("").as_posix(), text))
    if not found:
        raise NoSpeech(f"no recording ({', '.join(SUFFIXES)}) in {source}")
    return found


def _of_manifest(manifest: Path) -> list[Entry]:
    if manifest.suffix not in MANIFESTS:
        raise ValueError(f"{manifest}: expected a manifest ({', '.join(MANIFESTS)})")
    found = []
    for line, row in _rows(manifest):
        given = _column(row, PATHS)
        if not given:
            raise ValueError(
                f"{manifest}: line {line}: expected one of {', '.join(PATHS)}, got {', '.join(map(str, row))}"
            )
        places = [manifest.parent / part / given for part in ("", "clips")]
        path = next((place for place in places if place.exists()), places[0])
        name = Path(given).with_suffix("").as_posix()
        entry = Entry(path, name, _column(row, TEXTS), _column(row, SPEAKERS))
        if row.get("offset") not in (None, ""):
            where = f"{manifest}: line {line}"
            entry.begin = _seconds(row, "offset", where)
            entry.seconds = _seconds(row, "duration", where) if row.get("duration") else None
            entry.name += f"@{entry.begin:g}"
        found.append(entry)
    if not found:
        raise NoSpeech(f"{manifest} lists no recordings")
    return found


def _column(row: dict, names: tuple[str, ...]) -> str:
    return next((str(row[name]).strip() for name in names if row.get(name) is not None), "")


def _seconds(row: dict, name: str, where: str) -> float:
    try:
        value = float(row[name])
    except (TypeError, ValueError):
        value = math.nan
    if not 0 <= value < math.inf:
        raise ValueError(f"{where}: {name}: expected seconds, 0 or more, got {row[name]!r}")
    return value


def _rows(manifest: Path) -> list[tuple[int, dict]]:
    """Returns the lines' numbers and values by name."""
    try:
        text = manifest.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{manifest}: {error}") from None
    if manifest.suffix in (".tsv", ".csv"):
        style: dict = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if manifest.suffix == ".tsv" else {}
        return list(enumerate(csv.DictReader(text.splitlines(), **style), 2))
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            row = json.loads(line) if line.strip() else {}
        except ValueError as error:
            raise ValueError(f"{manifest}: line {number}: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{manifest}: line {number}: expected an object, got {line[:40]}")
        found += [(number, row)] if row else []
    return found
