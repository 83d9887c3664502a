"""The files of a shard set, in a folder or at any URL that fsspec opens (s3://, gs://, https://, memory://).

Remote bytes are read by range, block by block, because an epoch visits the blocks of a shard in random order. What was
read stays in a cache folder that all processes of the machine share: bounded in bytes, the least recently used goes
first. A cached file is named by its digest and compared with it each time, so a torn or damaged one is fetched again.
"""

import contextlib
import errno
import os
import threading
import time
from pathlib import Path

import xxhash

from quincunx.data_shards.errors import DataError, SettingsError

PAUSES_SECONDS = (0, 0.2, 0.8)  # before each attempt to read


class Files:
    """The files of a folder, or of a URL behind a cache of `cache_bytes` in `cache_dir`; fsspec reads both.

    root    as it was given, without file://
    folder  the folder, None for a URL
    cache   folder of the cached bytes of a URL, None for a folder
    """

    def __init__(self, root: str, cache_dir: str | None = None, cache_bytes: int = 0):
        import fsspec

        self.root = root.removeprefix("file://").rstrip("/")
        self.folder = None if "://" in self.root else Path(self.root)
        self.cache, self.cache_bytes = None, cache_bytes
        self._lock = threading.Lock()
        self._unscanned_bytes = 0
        try:
            self._file_system, self._prefix = fsspec.url_to_fs(self.root)
        except (ImportError, ValueError) as error:
            raise SettingsError(f"{root} cannot be opened: {error}") from None
        if not self.folder:
            self.cache = Path(cache_dir or os.environ.get("QUINCUNX_CACHE") or Path.home() / ".cache" / "quincunx")
            try:
                self.cache.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise SettingsError(f"cache_dir {self.cache} cannot be made ({error.strerror})") from None

    def read(self, name: str, offset: int, size: int, digest: str) -> bytes:
        """Bytes [offset, offset + size) of a file, of the given xxh3_64 (16 hex digits) or xxh3_128 (32).

        Raises:
            DataError: the file is missing or cannot be read, or has other bytes. The message goes on from its name.
        """
        digest_of = xxhash.xxh3_64_hexdigest if len(digest) == 16 else xxhash.xxh3_128_hexdigest
        cached = self.cache and self.cache / f"{digest}-{size}"
        if cached:
            with contextlib.suppress(OSError):  # not there, or evicted by another process meanwhile
                data = cached.read_bytes()
                if digest_of(data) == digest:
                    os.utime(cached)
                    return data
        data = self._fetch(name, start=offset, end=offset + size)
        if data is None:
            raise DataError("is missing")
        if len(data) > size:  # a web server that does not know ranges sends all
            data = data[offset : offset + size]
        if digest_of(data) != digest:
            raise DataError("does not match its digest")
        if cached and size <= self.cache_bytes:
            temporary = cached.with_name(f"{cached.name}.{os.getpid()}-{threading.get_ident()}.tmp")
            try:
                self._make_room(size)
                temporary.write_bytes(data)
                os.replace(temporary, cached)
            except OSError as error:  # a full disk, or another process that evicts this file: the run goes on
                temporary.unlink(missing_ok=True)
                if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.ENOENT):
                    raise DataError(f"cannot be cached in {self.cache} ({error.strerror})") from None
        return data

    def read_all(self, name: str) -> bytes | None:
        """A whole file as it is now, unchecked and never from the cache; None if it does not exist.

        Raises:
            DataError: the file, or its server or bucket, cannot be read.
        """
        try:
            return self._fetch(name)
        except DataError as error:
            raise DataError(f"{self.root}/{name} {error}: check the address and your credentials for it") from None

    def _fetch(self, name: str, **span: int) -> bytes | None:
        """The bytes of a file or of its span start, end; None if it is missing. fsspec's https does not try again."""
        for pause_seconds in PAUSES_SECONDS:
            time.sleep(pause_seconds)
            try:
                return self._file_system.cat_file(f"{self._prefix}/{name}", **span)
            except (FileNotFoundError, NotADirectoryError):
                return None
            except Exception as error:  # each file system raises its own classes
                problem = f"{type(error).__name__}: {error}"
        raise DataError(f"cannot be read after {len(PAUSES_SECONDS)} attempts ({problem})")

    def _make_room(self, wanted: int) -> None:
        """Deletes the least recently used files beyond 9/10 of the cache, once this process has written 1/512 of it.

        So few scans of the folder are enough for 32 processes to keep the bound of one cache together.
        """
        with self._lock:
            self._unscanned_bytes += wanted
            if self._unscanned_bytes <= self.cache_bytes // 512:
                return
            self._unscanned_bytes = 0
            files = []
            for entry in os.scandir(self.cache):
                with contextlib.suppress(FileNotFoundError):  # another process evicted it
                    if entry.is_file():
                        files.append((entry.stat().st_mtime_ns, entry.stat().st_size, entry.path))
            excess = wanted + sum(size for _, size, _ in files) - self.cache_bytes * 9 // 10
            for _, size, path in sorted(files):
                if excess <= 0:
                    break
                Path(path).unlink(missing_ok=True)
                excess -= size
