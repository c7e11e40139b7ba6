"""Downloads come from a real server on the loopback address: cached, checked, and never half there."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from core.errors import InputError
from tasks.download import locate

CONTENT = b"1,2,3\n"
CHECKSUM = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Path]]:
    """Serve a folder and return its address and path; the cache is a folder of the test."""
    monkeypatch.setenv("FEDRA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    published = tmp_path / "published"
    published.mkdir()
    (published / "table.csv").write_bytes(CONTENT)
    handler = partial(SimpleHTTPRequestHandler, directory=str(published))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_address[1]}/table.csv", published
        httpd.shutdown()


def test_a_file_is_downloaded_once_and_then_comes_from_the_cache(server: tuple[str, Path]) -> None:
    address, published = server
    folder = locate("numbers", "", {"table.csv": (address, CHECKSUM)})
    assert (folder / "table.csv").read_bytes() == CONTENT
    (published / "table.csv").unlink()
    assert locate("numbers", "", {"table.csv": (address, CHECKSUM)}) == folder


def test_a_damaged_file_in_the_cache_is_fetched_again(server: tuple[str, Path]) -> None:
    folder = locate("numbers", "", {"table.csv": (server[0], CHECKSUM)})
    (folder / "table.csv").write_bytes(b"broken")
    locate("numbers", "", {"table.csv": (server[0], CHECKSUM)})
    assert (folder / "table.csv").read_bytes() == CONTENT


def test_a_file_that_changed_at_the_publisher_is_refused_and_not_kept(server: tuple[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has changed: its SHA-256 is .* data-dir=FOLDER"):
        locate("numbers", "", {"table.csv": (server[0], "0" * 64)})
    assert not (tmp_path / "cache" / "numbers" / "table.csv").exists()


def test_a_missing_address_names_the_remedy(server: tuple[str, Path]) -> None:
    with pytest.raises(InputError, match=r"cannot download .*404.* data-dir=FOLDER"):
        locate("numbers", "", {"table.csv": (server[0] + "x", CHECKSUM)})


def test_data_dir_is_used_as_it_is_and_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"needs the file table\.csv"):
        locate("numbers", str(tmp_path), {"table.csv": ("http://127.0.0.1:1/", CHECKSUM)})
    (tmp_path / "table.csv").write_bytes(b"my own rows")
    assert locate("numbers", str(tmp_path), {"table.csv": ("http://127.0.0.1:1/", CHECKSUM)}) == tmp_path
