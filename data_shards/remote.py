"""Where a shard set's bytes come from: a folder, or any URL that fsspec opens (s3://, gs://, https://, memory://).

Remote bytes are read by range, block by block, because an epoch visits the blocks of a shard in random order. What was
read once stays in a local cache folder: bounded in bytes, least recently used first to go, shared by all processes of a
machine. A cached file is named by its digest and digest-checked each time it is read, so a torn or damaged one is
fetched again and never used.
"""

import contextlib
import errno
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from quincunx.data_shards.errors import DataError, SettingsError

DEFAULT_CACHE_BYTES = 64 * 2**30
STALE_SECONDS = 24 * 3600
ATTEMPTS = 3


class LocalFiles:
    """A folder of this machine (or of a file system mounted on it)."""

    def __init__(self, root: str):
        self.root = root

    def read(
        self, name: str, offset: int, size: int, file_bytes: int, digest: Callable[[bytes], str], expected: str
    ) -> bytes:
        """Bytes [offset, offset + size) of file `name`, which is `file_bytes` long and whose digest is `expected`.

        Raises:
            DataError: the file is missing, has another length, cannot be read, or the bytes do not match.
        """
        try:
            descriptor = os.open(os.path.join(self.root, name), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise DataError("is missing") from None
        except OSError as error:
            raise DataError(f"cannot be opened ({error.strerror})") from None
        try:
            found = os.fstat(descriptor).st_size
            if found != file_bytes:
                raise DataError(f"has {found} bytes, the manifest says {file_bytes}")
            data = _read_fully(descriptor, offset, size)
        except OSError as error:
            raise DataError(f"cannot be read ({error.strerror})") from None
        finally:
            os.close(descriptor)
        if len(data) != size or digest(data) != expected:
            raise DataError("does not match its digest")
        return data

    def read_all(self, name: str) -> bytes | None:
        """A whole file as it lies there now, unchecked; None where it does not exist."""
        try:
            return Path(self.root, name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None


def _read_fully(descriptor: int, offset: int, size: int) -> bytes:
    """os.pread may give less than asked: after a signal, or beyond 2 GiB."""
    data = os.pread(descriptor, size, offset)
    while len(data) < size:
        more = os.pread(descriptor, size - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


class RemoteFiles:
    """A URL behind a bounded local cache of `cache_bytes` in `cache_dir`."""

    def __init__(self, root: str, cache_dir: str, cache_bytes: int):
        import fsspec

        if cache_bytes < 1:
            raise SettingsError(f"cache_bytes is {cache_bytes}, it must be positive")
        self.root = root.rstrip("/")
        self.cache_bytes = cache_bytes
        self.cache_dir = Path(cache_dir)
        try:
            self.cache_dir.mkdir(parents=True, exist_ok=True)
            self.file_system, self.prefix = fsspec.url_to_fs(self.root)
        except OSError as error:
            raise SettingsError(f"cache_dir {cache_dir} cannot be made ({error.strerror})") from None
        except (ImportError, ValueError) as error:
            raise SettingsError(f"{root} cannot be opened: {error}") from None
        self._lock = threading.Lock()
        self._unscanned_bytes = 0  # what this process may still write before it scans the folder again

    def read(
        self, name: str, offset: int, size: int, file_bytes: int, digest: Callable[[bytes], str], expected: str
    ) -> bytes:
        """As LocalFiles.read; the cache answers where it holds these bytes."""
        cached = self.cache_dir / f"{expected}-{size}"
        try:
            data = cached.read_bytes()
            if len(data) == size and digest(data) == expected:
                os.utime(cached)
                return data
        except OSError:
            pass  # not there, or evicted by another process meanwhile
        data = self._fetch(name, offset, size, file_bytes)
        if len(data) != size or digest(data) != expected:
            raise DataError("does not match its digest")
        self._store(cached, data)
        return data

    def read_all(self, name: str) -> bytes | None:
        """As LocalFiles.read_all; never from the cache.

        Raises:
            DataError: the server or bucket cannot be reached, or refuses.
        """
        try:
            return self._retry(lambda: self.file_system.cat_file(f"{self.prefix}/{name}"))
        except FileNotFoundError:
            return None
        except DataError as error:
            raise DataError(f"{self.root}/{name} {error}: check the address and your credentials for it") from None

    def _fetch(self, name: str, offset: int, size: int, file_bytes: int) -> bytes:
        path = f"{self.prefix}/{name}"
        try:
            data = self._retry(lambda: self.file_system.cat_file(path, start=offset, end=offset + size))
        except FileNotFoundError:
            raise DataError("is missing") from None
        if len(data) == file_bytes and size < file_bytes:
            data = data[offset : offset + size]  # an http server that does not know ranges sends all
        return data

    def _retry(self, read: Callable[[], bytes]) -> bytes:
        for attempt in range(ATTEMPTS):
            try:
                return read()
            except FileNotFoundError:
                raise
            except Exception as error:  # each file system raises its own classes
                if attempt == ATTEMPTS - 1:
                    raise DataError(
                        f"cannot be read after {ATTEMPTS} attempts ({type(error).__name__}: {error})"
                    ) from error
                time.sleep(0.2 * 4**attempt)
        raise AssertionError("unreachable")

    def _store(self, cached: Path, data: bytes) -> None:
        """Puts bytes into the cache under their final name at once; a full disk costs the cache, not the run."""
        if len(data) > self.cache_bytes:
            return
        try:
            self._make_room(len(data))
            _write_at_once(cached, data)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise DataError(f"cannot be cached in {self.cache_dir} ({error.strerror})") from None

    def _make_room(self, wanted: int) -> None:
        """Deletes the least recently used files until `wanted` more bytes fit; other processes may do the same.

        The folder is scanned once for every 1/32 of the free room that this process fills, so that 32 processes with
        one cache keep its bound together.
        """
        with self._lock:
            self._unscanned_bytes -= wanted
            if self._unscanned_bytes >= 0:
                return
            entries = []
            for entry in os.scandir(self.cache_dir):
                with contextlib.suppress(FileNotFoundError):  # another process evicted it
                    status = entry.stat()
                    fresh = status.st_mtime > time.time() - STALE_SECONDS
                    if entry.is_file() and not (entry.name.endswith(".tmp") and fresh):
                        entries.append((status.st_mtime_ns, status.st_size, entry.path))
            used = sum(size for _, size, _ in entries)
            if used + wanted > self.cache_bytes:
                goal = max(0, min(self.cache_bytes - wanted, self.cache_bytes * 9 // 10))
                for _, size, path in sorted(entries):
                    if used <= goal:
                        break
                    Path(path).unlink(missing_ok=True)
                    used -= size
            self._unscanned_bytes = (self.cache_bytes - used - wanted) // 32


def _write_at_once(path: Path, data: bytes) -> None:
    """Writes a file that appears under its name when it is whole; leaves nothing behind where that fails."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except OSError:
        Path(temporary).unlink(missing_ok=True)
        raise


def open_files(root: str, cache_dir: str | None, cache_bytes: int) -> LocalFiles | RemoteFiles:
    """A folder, or a URL behind its cache (default: $QUINCUNX_CACHE, else ~/.cache/quincunx)."""
    if root.startswith("file://"):
        return LocalFiles(root.removeprefix("file://"))
    if "://" not in root:
        return LocalFiles(root)
    return RemoteFiles(root, cache_dir or default_cache_dir(), cache_bytes)


def default_cache_dir() -> str:
    return os.environ.get("QUINCUNX_CACHE") or str(Path.home() / ".cache" / "quincunx")
