"""Files that are always whole: a reader meets the new one or the old one, never a half."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import re
import typing
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

if typing.TYPE_CHECKING:
    from torch import Tensor


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


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """A safetensors file that is always whole. A full disk is an OSError that names `path`."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with replacing(path, "wb") as file:
        try:
            save_file(tensors, file.name, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{path} cannot be written: {error}") from None


def write_json(path: Path, value: object) -> None:
    """Write a file that is always whole: the new one or the old one."""
    with replacing(path) as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_object(path: Path) -> dict:
    """The JSON object in a file. ValueError names the file."""
    return _object(path.read_bytes(), str(path))


def _object(content: bytes, place: str) -> dict:
    """The JSON object in some bytes. ValueError begins with the place."""
    try:
        value = json.loads(content.decode("utf-8-sig"))
        if b"\\ud" in content.lower():  # half a surrogate pair is JSON, but no text
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not JSON in UTF-8 ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{place}: an object {{...}} is expected, this is a {type(value).__name__}")
    return value


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# ---- JSON Lines ----------------------------------------------------------------------------------------------------

LONGEST_LINE = 64 << 20  # bytes; no question and no answer is as long
LONGEST_ARRAY = 1 << 30  # bytes; it is read at once
PANDAS = "pandas.read_{}(path{}).to_json('new.jsonl', orient='records', lines=True) makes JSON Lines of it"
OTHER_FORMATS = {  # how a file of another format begins, and what to do with it
    rb"\xff\xfe|\xfe\xff|\x00?[{[]\x00|\x00+[{[]": "text in UTF-16 or UTF-32: save it in UTF-8",
    rb"PAR1": f"Parquet: {PANDAS.format('parquet', '')}",
    rb"ARROW1": f"Arrow: {PANDAS.format('feather', '')}",
    rb"PK\x03\x04": "a ZIP archive or a spreadsheet: unpack it, or save the sheet as JSON Lines",
    rb"BZh|\xfd7zXZ|\x28\xb5\x2f\xfd|7z\xbc\xaf": "compressed, and not by gzip: unpack it",
    rb"version https://git-lfs": "a pointer of Git LFS: 'git lfs pull' gets the file itself",
    rb"\s*<": "a web page or XML: download the file itself",
    rb"\s*[^\s{[\x00][^{[\n\x00]*\t": f"a table in TSV: {PANDAS.format('csv', ', sep=chr(9)')}",
    rb"\s*[^\s{[\x00][^{[\n\x00]*[,;]": f"a table in CSV: {PANDAS.format('csv', '')}",
}
SPREAD = re.compile(rb"(?:\xef\xbb\xbf)?\s*(?:\[|\{\s*\n)")  # how an array begins, or an object over several lines


def read_jsonl(path: str | Path, required: Iterable[str] = ()) -> Iterator[dict]:
    """Yield the objects of a file, each with the `required` texts: one a line, or those of an array; also with gzip.

    An empty line is skipped. ValueError names file, line and fault, or the format if it is another one.
    """
    return (row for _, row in numbered_jsonl(path, required))


def numbered_jsonl(path: str | Path, required: Iterable[str] = ()) -> Iterator[tuple[int, dict]]:
    """The same with the number of each object's first line."""
    for number, line in _lines(Path(path)):
        place = f"{path}, line {number}"
        if len(line) == LONGEST_LINE:
            raise ValueError(f"{place}: longer than {LONGEST_LINE >> 20} MB, is it JSON Lines?")
        if not line.strip():
            continue
        row = _object(line, place)
        for key in required:
            if key not in row:
                raise ValueError(f"{place}: there is no '{key}', the keys are {', '.join(row)!r:.80}")
            if not isinstance(row[key], str):
                raise ValueError(f"{place}: '{key}' must be a text, this is {row[key]!r:.80}")
        yield number, row


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found")
    with path.open("rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    try:
        with gzip.open(path) if zipped else path.open("rb") as file:
            start = file.read(1 << 12)
            file.seek(0)
            for beginning, what in OTHER_FORMATS.items():
                if re.match(rb"(?:\xef\xbb\xbf)?(?:%b)" % beginning, start):
                    raise ValueError(f"{path} holds no JSON Lines but {what}")
            if SPREAD.match(start):
                yield from _spread(file.read(LONGEST_ARRAY), path)
            else:
                yield from enumerate(iter(lambda: file.readline(LONGEST_LINE), b""), 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a whole gzip file: {error}") from None


def _spread(content: bytes, path: Path) -> Iterator[tuple[int, bytes]]:
    """The values of an array, or those that stand one after the other, each with the number of its first line."""
    line, decoder, between = 1, json.JSONDecoder(), re.compile(r"[\s,]*")
    try:
        if len(content) == LONGEST_ARRAY:
            raise ValueError(f"longer than {LONGEST_ARRAY >> 20} MB, write one object a line")
        text = content.decode("utf-8-sig")
        array = text.lstrip().startswith("[")
        at = text.index("[") + 1 if array else 0
        line += text.count("\n", 0, at)
        while (start := between.match(text, at).end()) < len(text) and text[start] != "]":
            line += text.count("\n", at, start)
            _, at = decoder.raw_decode(text, start)
            yield line, text[start:at].encode()
            line += text.count("\n", start, at)
        if text[start:].strip() != "]" * array:
            raise ValueError("the array does not end, or something follows it")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}, line {line}: not JSON in UTF-8 ({error})") from None


def write_jsonl(path: str | Path, rows: Iterable[dict]) -> None:
    """Write one object a line; a reader never meets half a file."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(Path(path)) as file:
        file.write(lines(rows))


def lines(rows: Iterable[dict]) -> str:
    """Objects as the lines of a JSONL."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
