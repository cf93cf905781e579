"""Find what was handed in: folders, archives and files as learning platforms give them. Nothing vanishes silently.

Nothing is unpacked to the disk: members of archives are read in memory, wherever their paths point.
"""

import io
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from exercises import EXERCISES

FILES = sorted({exercise.file for exercise in EXERCISES})
# browsers number what is downloaded twice, 'ppo (1).py'; platforms put a name before a lone file, 'ada_ppo.py'
NAME = re.compile(rf"({'|'.join(file[:-3] for file in FILES)})([ _]?\(\d+\)|-\d+)?\.py", re.IGNORECASE)
LONE = re.compile(rf"(?:.*?[_ -])??{NAME.pattern}", re.IGNORECASE)
ARCHIVES, FOREIGN = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz"), (".rar", ".7z")
Script = tuple[PurePosixPath, bytes | Exception]  # its place in a submission, and its contents
LARGEST_FILE, LARGEST_ARCHIVE, DEEPEST = 1 << 20, 1 << 26, 8  # bytes, bytes, folders and archives in each other


def is_junk(name: str) -> bool:
    return name.startswith("._") or name in (".git", ".DS_Store", "__MACOSX", ".venv", "venv", "site-packages")


def submissions(paths: list[Path]) -> list[Path]:
    """Every folder, archive or file that is one submission: a folder without exercise files holds submissions."""
    found = []
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{path}: there is no such folder, archive or file")
        inside = sorted(part for part in path.iterdir() if not is_junk(part.name)) if path.is_dir() else []
        if path.is_dir() and not inside:
            raise ValueError(f"{path} is empty")
        found += inside if inside and not any(NAME.fullmatch(part.name) for part in inside) else [path]
    return found


def read_submission(path: Path, notes: list[str] | None = None) -> dict[str, str | Exception]:
    """The exercise files of a submission, wherever they lie in it: module -> text, or why there is none.

    Of several with one name the least deep counts. `notes` hears what was odd, and why nothing was found.
    """
    notes = [] if notes is None else notes
    copies: dict[str, list[Script]] = {}
    for inner, data in scripts(path, notes):
        if match := (NAME if path.is_dir() or len(inner.parts) > 1 else LONE).fullmatch(inner.name):
            copies.setdefault(match[1].lower(), []).append((inner, data))
    sources: dict[str, str | Exception] = {}
    for stem, found in sorted(copies.items()):
        inner, data = min(found, key=lambda copy: (len(copy[0].parts), len(copy[0].name), str(copy[0])))
        if any(other != data for _, other in found):
            notes.append(f"there are {len(found)} different {stem}.py; {inner} counts")
        try:
            if isinstance(data, Exception):
                raise data
            sources[stem] = data.decode("utf-8-sig").replace("\r\n", "\n")
        except Exception as error:  # of any reader
            sources[stem] = ValueError(f"cannot be read ({error})")
    if not sources:
        empty = path.is_dir() and not any(path.iterdir())
        notes.append("it is empty" if empty else f"nothing in it is named like one of {', '.join(FILES)}")
    return sources


def scripts(path: Path, notes: list[str]) -> Iterator[Script]:
    """Every Python file of a folder, an archive or a lone file."""
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        inner = PurePosixPath(file.relative_to(path).as_posix() if path.is_dir() else path.name)
        if path.is_dir() and path.resolve() not in file.resolve().parents:
            notes.append(f"{inner} is a link to elsewhere, and not read")  # it could lead to the solution
        elif file.is_file():
            yield from opened(inner, file.stat().st_size, file.read_bytes, notes)


def opened(inner: PurePosixPath, size: int, read: Callable[[], bytes], notes: list[str]) -> Iterator[Script]:
    """A file if it is Python; all of them in an archive; a note about what cannot be looked into."""
    suffix = inner.suffix.lower()
    if any(map(is_junk, inner.parts)):
        return
    if suffix in FOREIGN:
        notes.append(f"{inner}: a {suffix} archive cannot be read here; ask for a .zip")
    elif suffix in ARCHIVES and (size > LARGEST_ARCHIVE or len(inner.parts) > DEEPEST):
        notes.append(f"{inner}: too large, or too deep in other archives")
    elif suffix in ARCHIVES:
        try:
            for name, length, member in members(read()):
                yield from opened(inner / name.replace("\\", "/").lstrip("/"), length, member, notes)
        except Exception as error:  # a damaged archive fails in many ways
            notes.append(f"{inner}: this archive cannot be read ({error})")
    elif suffix == ".py":
        try:
            yield inner, read() if size <= LARGEST_FILE else ValueError(f"larger than {LARGEST_FILE} bytes")
        except Exception as error:
            yield inner, error


def members(data: bytes) -> Iterator[tuple[str, int, Callable[[], bytes]]]:
    """Name, size and reader of every plain file in an archive."""
    if zipfile.is_zipfile(io.BytesIO(data)):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for info in archive.infolist():
                if not info.is_dir():
                    yield info.filename, info.file_size, lambda info=info: archive.read(info)
    else:
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            for info in archive:
                if info.isfile():
                    yield info.name, info.size, lambda info=info: archive.extractfile(info).read()
