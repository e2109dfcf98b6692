# SPDX-License-Identifier: Apache-2.0
"""Writes files that are whole at any moment: a reader, and a start after a kill, finds the old content or the new."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

SUFFIX = ".unfinished"
_ABANDONED_S = 3600  # A killed process left a file that nobody has written to for this long.


@contextlib.contextmanager
def replacing(path: str | os.PathLike, durable: bool = True) -> Iterator[Path]:
    """Yields the path of a new file in the folder of ``path`` and renames it to ``path`` when the block has ended.

    If the block raises an error, or the process is killed, ``path`` stays as it was. Each call has its own file, so
    processes that write one path at once do not disturb each other; the last one wins. A killed process leaves its
    file, which a later call in the same folder deletes. If ``durable`` is set, the content is on the disk before the
    renaming, so it survives a loss of power too. A device or a pipe is written directly. Raises OSError, which names
    ``path``, if the folder cannot be written to.
    """
    path = Path(os.path.realpath(path))  # A link stays; its file is replaced.
    if path.exists() and not path.is_file():
        yield path
        return
    unfinished = path.parent / f".fastasr-{secrets.token_hex(8)}{SUFFIX}"
    try:
        os.close(os.open(unfinished, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    try:
        _delete_abandoned(unfinished)
        yield unfinished
        if durable:
            with unfinished.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def write(path: str | os.PathLike, content: str | bytes, durable: bool = True) -> None:
    """Writes a text, as UTF-8, or bytes as ``replacing`` does."""
    with replacing(path, durable) as unfinished:
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)


def _delete_abandoned(unfinished: Path) -> None:
    now = unfinished.stat().st_mtime  # the file system's clock
    for other in unfinished.parent.glob(f".fastasr-*{SUFFIX}"):
        with contextlib.suppress(OSError):  # Another process may have renamed or deleted it.
            if now - other.stat().st_mtime > _ABANDONED_S:
                other.unlink()
