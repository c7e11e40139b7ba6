"""Find a data set's files: in `data-dir`, in the cache, or at the publisher, checked against a known SHA-256."""

from __future__ import annotations

import hashlib
import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from core.errors import InputError

TIMEOUT_SECONDS = 30


def cache_folder(name: str) -> Path:
    """Return the folder where a data set's downloads are kept: $FEDRA_CACHE or ~/.cache/fedra, then its name."""
    return Path(os.environ.get("FEDRA_CACHE", Path.home() / ".cache" / "fedra")) / name


def locate(name: str, data_dir: str, sources: Mapping[str, tuple[str, str]]) -> Path:
    """Return a folder that holds every file of `sources` (file name -> (address, SHA-256)).

    Files in `data_dir` are used as they are; without it, files are taken from the cache or downloaded into it, and a
    file whose checksum is wrong is never used. Raises `InputError` naming the file and the remedy.
    """
    if data_dir:
        folder = Path(data_dir)
        if not folder.is_dir():
            needed = ", ".join(sources)
            raise InputError(f"data-dir={data_dir} is not a folder; data set '{name}' needs {needed} in it.")
        for file, (address, _) in sources.items():
            if not (folder / file).is_file():
                raise InputError(
                    f"data set '{name}' needs the file {file}, which is not in the folder {folder.absolute()} "
                    f"(data-dir={data_dir}); get it from {address} , or leave data-dir out to have it downloaded."
                )
        return folder
    folder = cache_folder(name)
    for file, (address, checksum) in sources.items():
        path = folder / file
        if not path.is_file() or _sha256(path.read_bytes()) != checksum:
            _download(name, address, checksum, path)
    return folder


def _download(name: str, address: str, checksum: str, path: Path) -> None:
    remedy = f"download the files of '{name}' elsewhere and give their folder as data-dir=FOLDER"
    try:
        with urllib.request.urlopen(address, timeout=TIMEOUT_SECONDS) as reply:
            content = reply.read()
    except (urllib.error.URLError, OSError) as error:
        raise InputError(f"cannot download {address} ({error}); {remedy}.") from None
    if _sha256(content) != checksum:
        raise InputError(f"{address} has changed: its SHA-256 is {_sha256(content)}, expected {checksum}; {remedy}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    # Written beside and renamed: an interrupted download never leaves half a file under the name.
    part = path.with_suffix(path.suffix + ".part")
    part.write_bytes(content)
    os.replace(part, path)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
