"""A shard set opened for reading: blocks by number, each compared with the manifest before it is used.

Blocks of a split are numbered through its shards in manifest order, and samples through the blocks (the global sample
id). A block is read by offset, never through a tar reader: a cut inside a tar header or a zero-filled shard gives tar
readers fewer samples and no error.
"""

import os
import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np
import xxhash

from quincunx.data_shards.block import Block, decode_block
from quincunx.data_shards.errors import DataError
from quincunx.data_shards.manifest import (
    MANIFEST_NAME,
    SPLITS,
    TOKENIZER_FOLDER,
    BlockEntry,
    FileEntry,
    Manifest,
    ShardEntry,
)
from quincunx.data_shards.remote import (
    DEFAULT_CACHE_BYTES,
    LocalFiles,
    RemoteFiles,
    open_files,
)
from quincunx.data_shards.statistics import Statistics, load_statistics

TAR_HEADER_BYTES = 512
DEFAULT_BLOCK_CACHE_BYTES = 2 * 2**30


def open_shards(
    path: str,
    cache_dir: str | None = None,
    cache_bytes: int = DEFAULT_CACHE_BYTES,
    block_cache_bytes: int = DEFAULT_BLOCK_CACHE_BYTES,
) -> "ShardSet":
    """Opens the shard set in a folder or at a URL that fsspec knows.

    cache_dir, cache_bytes: the cache of remote bytes on this machine, shared by its processes.
    block_cache_bytes: decoded blocks that this process keeps in memory.

    Raises:
        DataError: no manifest there, a manifest that is foreign, damaged or of a newer version, a local shard that is
            missing or has another size, or a damaged statistics or tokenizer file.
    """
    path = os.fspath(path)
    files = open_files(path, cache_dir, cache_bytes)
    manifest = read_manifest(files)
    shard_set = ShardSet(path, files, manifest, block_cache_bytes)
    if isinstance(files, LocalFiles):
        check_shard_sizes(files.root, manifest)
    return shard_set


def read_manifest(files: LocalFiles | RemoteFiles) -> Manifest:
    """The manifest of a shard set; raises DataError where there is none, or one that cannot be used."""
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
            wrong.append((shard.name, "is missing"))
            continue
        if found != shard.bytes:
            block = next((i for i, b in enumerate(shard.blocks) if b.offset + b.size > found), None)
            part = f" (damaged from block {block} on)" if block is not None else " (no block is cut)"
            wrong.append((shard.name, f"has {found} bytes, the manifest says {shard.bytes}{part}"))
    if wrong:
        listed = "; ".join(f"shard {name} {what}" for name, what in wrong[:5])
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise DataError(f"{listed}{more}: {repair_hint(path)}")


def repair_hint(path: str) -> str:
    """How to mend a damaged set, as the end of a sentence."""
    return f"repair with `python launchers/verify_shards.py {path} --repair`, or copy the shard again"


def member_digest(header_and_content: bytes) -> str:
    """xxh3_64 of a tar member's header and content, 16 hex digits."""
    return xxhash.xxh3_64_hexdigest(header_and_content)


class ShardSet:
    """Reads blocks; safe to share between threads.

    path               where it was opened
    manifest           what it holds
    statistics         document frequencies and token counts
    tokenizer_folder   a local folder with the set's tokenizer
    """

    def __init__(self, path: str, files: LocalFiles | RemoteFiles, manifest: Manifest, block_cache_bytes: int):
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
        self.statistics: Statistics = load_statistics(
            self._read_file(manifest.statistics), f"{path}/{manifest.statistics.name}", manifest.vocab_size
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
        shard, number = self._entries[split][index]
        block = self._decode(shard, number)
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
        entry: BlockEntry = shard.blocks[number]
        data = self._read_member(shard, number, entry.offset, entry.size, entry.digest)
        try:
            block = decode_block(data, check=False)
        except DataError as error:
            raise self._block_error(shard, number, str(error)) from None
        if block.num_samples != entry.samples:
            raise self._block_error(shard, number, f"holds {block.num_samples} samples, not {entry.samples}")
        if len(block.token_ids) and (worst := int(block.token_ids.max())) >= self.manifest.vocab_size:
            raise self._block_error(
                shard, number, f"holds token id {worst} beyond the vocabulary of {self.manifest.vocab_size}"
            )
        return block

    def _read_member(self, shard: ShardEntry, number: int, offset: int, size: int, digest: str) -> memoryview:
        """The content of a tar member, after its header and content have been compared with the manifest."""
        try:
            data = self._files.read(
                shard.name,
                offset - TAR_HEADER_BYTES,
                size + TAR_HEADER_BYTES,
                shard.bytes,
                member_digest,
                digest,
            )
        except DataError as error:
            raise self._block_error(shard, number, str(error)) from None
        return memoryview(data)[TAR_HEADER_BYTES:]

    def _block_error(self, shard: ShardEntry, number: int, what: str) -> DataError:
        return DataError(f"block {number} of shard {shard.name} in {self.path} {what}: {repair_hint(self.path)}")

    def _read_file(self, entry: FileEntry, folder: str = "") -> bytes:
        name = f"{folder}/{entry.name}" if folder else entry.name
        try:
            return self._files.read(name, 0, entry.bytes, entry.bytes, xxhash.xxh3_128_hexdigest, entry.digest)
        except DataError as error:
            raise DataError(f"{name} in {self.path} {error}: {repair_hint(self.path)}") from None

    def _local_tokenizer(self) -> str:
        contents = {entry.name: self._read_file(entry, TOKENIZER_FOLDER) for entry in self.manifest.tokenizer_files}
        if isinstance(self._files, LocalFiles):
            return str(Path(self._files.root, TOKENIZER_FOLDER))
        folder = self._files.cache_dir / f"tokenizer-{self.manifest.dataset_id}"
        folder.mkdir(exist_ok=True)
        for name, content in contents.items():
            target = folder / name
            if not target.exists() or target.read_bytes() != content:
                temporary = folder / f"{name}.{os.getpid()}.tmp"
                temporary.write_bytes(content)
                os.replace(temporary, target)
        return str(folder)
