"""Files that are always whole: a reader meets the new one or the old one, never a half."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import typing
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path, mode: str = "w") -> Iterator[typing.IO]:
    """A file to be written, which takes the place of `path` once it is whole and on the disk; till then the old stands.

    A full disk, or a folder that cannot be written to, is an OSError that names `path`.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open(mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):  # a full disk does not say which file did not fit
            error.filename = error.filename or str(path)
        raise


def sync(path: Path) -> None:
    """Wait until a file's bytes, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: object) -> None:
    """Write a file that is always whole: the new one or the old one."""
    with replacing(path) as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_object(path: Path) -> dict:
    """The JSON object in a file. ValueError names the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}): copy it once more") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a JSON object: copy it once more")
    return content


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# ---- JSON Lines ----------------------------------------------------------------------------------------------------


def read_jsonl(path: str | Path, required: Iterable[str] = ()) -> Iterator[dict]:
    """Yield the objects of a .jsonl or .jsonl.gz, each with the `required` texts; an empty line is skipped.

    ValueError names file, line and fault.
    """
    return (row for _, row in numbered_jsonl(path, required))


def numbered_jsonl(
    path: str | Path, required: Iterable[str] = (), faults: list[str] | None = None
) -> Iterator[tuple[int, dict]]:
    """The same with each object's line number. Given a list of `faults`, note a bad line there and go on."""
    for number, line in _lines(Path(path)):
        try:
            row = _object(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line, required)
        except ValueError as error:
            refuse(f"{path}, line {number}: {error}", faults)
        else:
            if row is not None:
                yield number, row


LONGEST_LINE = 64 << 20  # bytes; no question and no answer is as long


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found")
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE), b""), 1):
                if len(line) == LONGEST_LINE:
                    raise ValueError(f"{path}, line {number}: longer than {LONGEST_LINE >> 20} MB, is it JSON Lines?")
                yield number, line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a whole gzip file: {error}") from None


def _object(line: bytes, required: Iterable[str]) -> dict | None:
    """The object on a line, None for an empty line; what is wrong is said without file and line."""
    try:
        text = line.decode().strip()
        row = json.loads(text) if text else None
        if "\\ud" in text.lower():  # half a surrogate pair is JSON, but no text
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"half a character ({error.object[error.start]!a}), which no file can hold") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error.reason} at byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from None
    if text and not isinstance(row, dict):
        raise ValueError(f"an object {{...}} is expected, this is a {type(row).__name__}")
    for key in required if text else ():
        if key not in row:
            raise ValueError(f"the key '{key}' is missing")
        if not isinstance(row[key], str):
            raise ValueError(f"'{key}' must be a text, this is a {type(row[key]).__name__}")
    return row


def refuse(fault: str, faults: list[str] | None) -> None:
    if faults is None:
        raise ValueError(fault)
    faults.append(fault)


def write_jsonl(path: str | Path, rows: Iterable[dict]) -> None:
    """Write one object a line; a reader never meets half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(lines(rows))


def lines(rows: Iterable[dict]) -> str:
    """Objects as the lines of a JSONL."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
