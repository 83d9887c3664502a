"""A shard set opened for reading: blocks by number, each compared with the manifest before it is used.

Blocks of a split are numbered through its shards in manifest order, and samples through the blocks (the global sample
id). A block is read by offset, never through a tar reader: a cut inside a tar header or a zero-filled shard gives tar
readers fewer samples and no error.

A set lies in a folder, or at any URL that fsspec opens (s3://, gs://, https://, memory://). Remote bytes are read by
range, block by block, because an epoch visits the blocks of a shard in random order. What was read stays in a cache
folder that all processes of the machine share: bounded in bytes, the least recently used goes first. A cached file is
named by its digest and compared with it each time, so a torn or damaged one is fetched again.
"""

import contextlib
import errno
import io
import os
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xxhash

from quincunx.data_shards.block import Block, decode_block
from quincunx.data_shards.errors import DataError, SettingsError
from quincunx.data_shards.manifest import (
    MANIFEST_NAME,
    SPLITS,
    TAR_HEADER_BYTES,
    TOKENIZER_FOLDER,
    FileEntry,
    Manifest,
    ShardEntry,
)

DEFAULT_CACHE_BYTES = 64 * 2**30
DEFAULT_BLOCK_CACHE_BYTES = 2 * 2**30
PAUSES_SECONDS = (0, 0.2, 0.8)  # before each attempt to read remote bytes
IDF_FLOOR = 0.01  # a word in every passage stays drawable, after all others
REMEDY = (
    "copy the file again, or delete a damaged shard and run the command in build.json again, which makes only what is "
    "missing (`python launchers/verify_shards.py` names all that is damaged)"
)
"""How to fix a damaged set, as the end of a sentence."""


def open_shards(
    path: str | Path,
    cache_dir: str | None = None,
    cache_bytes: int = DEFAULT_CACHE_BYTES,
    block_cache_bytes: int = DEFAULT_BLOCK_CACHE_BYTES,
) -> "ShardSet":
    """Opens the shard set in a folder or at a URL that fsspec knows.

    cache_dir, cache_bytes: the cache of remote bytes on this machine, shared by its processes (default:
        $QUINCUNX_CACHE, else ~/.cache/quincunx).
    block_cache_bytes: decoded blocks that this process keeps in memory.

    Raises:
        DataError: no manifest there, a manifest that is foreign, damaged or of a newer version, a local shard that is
            missing or has another size, or a damaged statistics or tokenizer file.
        SettingsError: a cache folder that cannot be made, or a URL that fsspec cannot open.
    """
    files = open_files(os.fspath(path), cache_dir, cache_bytes)
    manifest = read_manifest(files)
    if isinstance(files, LocalFiles):
        check_shard_sizes(files.root, manifest)
    return ShardSet(os.fspath(path), files, manifest, block_cache_bytes)


def read_manifest(files: "LocalFiles | RemoteFiles") -> Manifest:
    """The manifest of a shard set; raises DataError if there is none, or one that cannot be used."""
    data = files.read_all(MANIFEST_NAME)
    if data is None:
        raise DataError(
            f"{files.root} has no {MANIFEST_NAME}: it is not a finished shard set; run launchers/build_shards.py (an "
            "interrupted build continues with the same command)"
        )
    return Manifest.from_json(data.decode("utf-8", "replace"), f"{files.root}/{MANIFEST_NAME}")


def check_shard_sizes(path: str, manifest: Manifest) -> None:
    """Raises DataError naming every shard of a local set that is missing or has another size."""
    wrong = []
    for shard in manifest.shards:
        try:
            found = os.stat(os.path.join(path, shard.name)).st_size
        except FileNotFoundError:
            wrong.append(f"shard {shard.name} is missing")
            continue
        if found != shard.bytes:
            cut = next((i for i, block in enumerate(shard.blocks) if block.offset + block.size > found), None)
            part = "no block is cut" if cut is None else f"damaged from block {cut} on"
            wrong.append(f"shard {shard.name} has {found} bytes, the manifest says {shard.bytes} ({part})")
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise DataError(f"{'; '.join(wrong[:5])}{more}: {REMEDY}")


class ShardSet:
    """Reads blocks; safe to share between threads.

    path               where it was opened
    manifest           what it holds
    statistics         document frequencies and token counts
    tokenizer_folder   a local folder with the set's tokenizer
    """

    def __init__(self, path: str, files: "LocalFiles | RemoteFiles", manifest: Manifest, block_cache_bytes: int):
        self.path = path
        self.manifest = manifest
        self._files = files
        self._block_cache_bytes = block_cache_bytes
        self._blocks: OrderedDict[tuple[str, int], Block] = OrderedDict()
        self._cached_bytes = 0
        self._lock = threading.Lock()
        self._entries: dict[str, list[tuple[ShardEntry, int]]] = {
            split: [(s, i) for s in manifest.shards if s.split == split for i in range(len(s.blocks))]
            for split in SPLITS
        }
        self.statistics = Statistics.from_bytes(self._read_file(manifest.statistics.name, manifest.statistics))
        if self.statistics.vocab_size != manifest.vocab_size:
            raise DataError(
                f"{path}/{manifest.statistics.name} counts a vocabulary of {self.statistics.vocab_size}, the manifest "
                f"says {manifest.vocab_size}: build the shards again"
            )
        self.tokenizer_folder = self._local_tokenizer()

    def num_blocks(self, split: str) -> int:
        return len(self._entries[split])

    def num_samples(self, split: str) -> int:
        return self.manifest.num_samples(split)

    def block_samples(self, split: str) -> np.ndarray:
        """Samples of each block in global order, int64 [num_blocks]."""
        return np.array([shard.blocks[i].samples for shard, i in self._entries[split]], np.int64)

    def read_block(self, split: str, index: int) -> Block:
        """Block `index` of a split, its bytes compared with the manifest, its ids with the vocabulary.

        Raises:
            DataError: names shard, block, what is wrong with it, and the remedy.
        """
        with self._lock:
            block = self._blocks.get((split, index))
            if block is not None:
                self._blocks.move_to_end((split, index))
                return block
        block = self._decode(*self._entries[split][index])
        with self._lock:
            if (split, index) not in self._blocks:
                self._blocks[split, index] = block
                self._cached_bytes += block.nbytes
            while self._cached_bytes > self._block_cache_bytes and len(self._blocks) > 1:
                self._cached_bytes -= self._blocks.popitem(last=False)[1].nbytes
        return block

    def passage_ids(self, split: str, index: int) -> list[str]:
        """The corpus's own ids of the passages of a block."""
        shard, number = self._entries[split][index]
        entry = shard.blocks[number]
        data = self._read_member(shard, number, entry.ids_offset, entry.ids_size, entry.ids_digest)
        return bytes(data).decode("utf-8").split("\n")

    def _decode(self, shard: ShardEntry, number: int) -> Block:
        entry = shard.blocks[number]
        data = self._read_member(shard, number, entry.offset, entry.size, entry.digest)
        with self._named(f"block {number} of shard {shard.name}"):
            block = decode_block(data, check=False)
            if block.num_samples != entry.samples:
                raise DataError(f"holds {block.num_samples} samples, not {entry.samples}")
            if len(block.token_ids) and (worst := int(block.token_ids.max())) >= self.manifest.vocab_size:
                raise DataError(f"holds token id {worst} beyond the vocabulary of {self.manifest.vocab_size}")
        return block

    def _read_member(self, shard: ShardEntry, number: int, offset: int, size: int, digest: str) -> memoryview:
        """The content of a tar member, after its header and content have been compared with the manifest."""
        span = Span(shard.name, shard.bytes, offset - TAR_HEADER_BYTES, size + TAR_HEADER_BYTES, digest)
        with self._named(f"block {number} of shard {shard.name}"):
            return memoryview(self._files.read(span))[TAR_HEADER_BYTES:]

    def _read_file(self, name: str, entry: FileEntry) -> bytes:
        with self._named(name):
            return self._files.read(Span(name, entry.bytes, 0, entry.bytes, entry.digest))

    @contextlib.contextmanager
    def _named(self, what: str):
        """Puts the subject and the remedy around a DataError that says what is wrong."""
        try:
            yield
        except DataError as error:
            raise DataError(f"{what} in {self.path} {error}: {REMEDY}") from None

    def _local_tokenizer(self) -> str:
        contents = {
            entry.name: self._read_file(f"{TOKENIZER_FOLDER}/{entry.name}", entry)
            for entry in self.manifest.tokenizer_files
        }
        if isinstance(self._files, LocalFiles):
            return str(Path(self._files.root, TOKENIZER_FOLDER))
        folder = self._files.cache_dir / f"tokenizer-{self.manifest.dataset_id}"
        folder.mkdir(exist_ok=True)
        for name, content in contents.items():
            if not (folder / name).exists() or (folder / name).read_bytes() != content:
                write_at_once(folder / name, content)
        return str(folder)


@dataclass(frozen=True, eq=False)
class Statistics:
    """Frequencies over `num_passages` passages of the train split: for TF-IDF keywords and the unigram yardstick.

    token_counts        int64 [vocab_size]: occurrences of each token id in the passages
    document_frequency  uint32 [vocab_size + num_buckets]: passages that hold a word of the slot (hashing.word_slot)
    idf                 float32, same shape: max(log((num_passages + 1) / (df + 1)), 0.01)
    """

    num_passages: int
    token_counts: np.ndarray
    document_frequency: np.ndarray
    idf: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        ratio = (self.num_passages + 1) / (self.document_frequency.astype(np.float64) + 1)
        object.__setattr__(self, "idf", np.maximum(np.log(ratio), IDF_FLOOR).astype(np.float32))

    @property
    def vocab_size(self) -> int:
        return len(self.token_counts)

    @staticmethod
    def from_bytes(data: bytes) -> "Statistics":
        """Reads statistics.npz."""
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            return Statistics(int(arrays["num_passages"]), arrays["token_counts"], arrays["document_frequency"])


@dataclass(frozen=True)
class Span:
    """Bytes [offset, offset + size) of file `name`, which is `file_bytes` long, and their digest.

    A digest of 16 hex digits is xxh3_64's, one of 32 xxh3_128's.
    """

    name: str
    file_bytes: int
    offset: int
    size: int
    digest: str

    def matches(self, data: bytes) -> bool:
        digest_of = xxhash.xxh3_64_hexdigest if len(self.digest) == 16 else xxhash.xxh3_128_hexdigest
        return len(data) == self.size and digest_of(data) == self.digest


class LocalFiles:
    """A folder of this machine (or of a file system mounted on it)."""

    def __init__(self, root: str):
        self.root = root

    def read(self, span: Span) -> bytes:
        """The bytes of a span.

        Raises:
            DataError: the file is missing, has another length, cannot be read, or the bytes do not match. The message
                goes on from the file's name.
        """
        try:
            with open(os.path.join(self.root, span.name), "rb") as file:
                found = os.fstat(file.fileno()).st_size
                if found != span.file_bytes:
                    raise DataError(f"has {found} bytes, the manifest says {span.file_bytes}")
                file.seek(span.offset)
                data = file.read(span.size)
        except FileNotFoundError:
            raise DataError("is missing") from None
        except OSError as error:
            raise DataError(f"cannot be read ({error.strerror})") from None
        if not span.matches(data):
            raise DataError("does not match its digest")
        return data

    def read_all(self, name: str) -> bytes | None:
        """A whole file as it lies there now, unchecked; None if it does not exist."""
        try:
            return Path(self.root, name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None


class RemoteFiles:
    """A URL behind a cache of `cache_bytes` in `cache_dir`."""

    def __init__(self, root: str, cache_dir: str, cache_bytes: int):
        import fsspec

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

    def read(self, span: Span) -> bytes:
        """As LocalFiles.read; the cache answers if it holds these bytes."""
        cached = self.cache_dir / f"{span.digest}-{span.size}"
        with contextlib.suppress(OSError):  # not there, or evicted by another process meanwhile
            data = cached.read_bytes()
            if span.matches(data):
                os.utime(cached)
                return data
        data = self._fetch(span.name, start=span.offset, end=span.offset + span.size)
        if data is None:
            raise DataError("is missing")
        if len(data) == span.file_bytes > span.size:  # an http server that does not know ranges sends all
            data = data[span.offset : span.offset + span.size]
        if not span.matches(data):
            raise DataError("does not match its digest")
        try:
            if span.size <= self.cache_bytes:
                self._make_room(span.size)
                write_at_once(cached, data)
        except OSError as error:  # a full disk, or another process that evicts this file: the run goes on
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.ENOENT):
                raise DataError(f"cannot be cached in {self.cache_dir} ({error.strerror})") from None
        return data

    def read_all(self, name: str) -> bytes | None:
        """As LocalFiles.read_all; never from the cache.

        Raises:
            DataError: the server or bucket cannot be reached, or refuses.
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
                return self.file_system.cat_file(f"{self.prefix}/{name}", **span)
            except FileNotFoundError:
                return None
            except Exception as error:  # each file system raises its own classes
                problem = f"{type(error).__name__}: {error}"
        raise DataError(f"cannot be read after {len(PAUSES_SECONDS)} attempts ({problem})")

    def _make_room(self, wanted: int) -> None:
        """Deletes the least recently used files until `wanted` more bytes fit; other processes may do the same.

        The folder is scanned once for every 1/32 of the free room that this process fills, so that 32 processes with
        one cache keep its bound together.
        """
        with self._lock:
            self._unscanned_bytes -= wanted
            if self._unscanned_bytes >= 0:
                return
            files = []
            for entry in os.scandir(self.cache_dir):
                with contextlib.suppress(FileNotFoundError):  # another process evicted it
                    if entry.is_file():
                        files.append((entry.stat().st_mtime_ns, entry.stat().st_size, entry.path))
            used = sum(size for _, size, _ in files)
            if used + wanted > self.cache_bytes:
                goal = min(self.cache_bytes - wanted, self.cache_bytes * 9 // 10)
                for _, size, path in sorted(files):
                    if used <= goal:
                        break
                    Path(path).unlink(missing_ok=True)
                    used -= size
            self._unscanned_bytes = (self.cache_bytes - used - wanted) // 32


def write_at_once(path: Path, data: bytes) -> None:
    """Writes a file that appears under its name when it is whole; threads and processes may write the same one."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def open_files(root: str, cache_dir: str | None, cache_bytes: int) -> LocalFiles | RemoteFiles:
    """A folder, or a URL behind its cache."""
    root = root.removeprefix("file://")
    if "://" not in root:
        return LocalFiles(root)
    default = os.environ.get("QUINCUNX_CACHE") or str(Path.home() / ".cache" / "quincunx")
    return RemoteFiles(root, cache_dir or default, cache_bytes)
