"""Writes shards: documents of samples in, tar files and their manifest entries out.

The bytes depend on the samples alone: USTAR members in sorted order, mtime 0, uid 0, no names of users. A file appears
under its final name only when it is complete and on disk.
"""

import errno
import os
import shutil
import tarfile
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import xxhash

from quincunx.data_shards.block import FIELDS, Block, decode_block
from quincunx.data_shards.block_writer import Sample, encode_block
from quincunx.data_shards.errors import DataError
from quincunx.data_shards.manifest import (
    DEFAULT_BLOCK_SAMPLES,
    DEFAULT_NUM_BUCKETS,
    DEFAULT_SHARD_BYTES,
    MANIFEST_NAME,
    SPLITS,
    STATISTICS_NAME,
    TOKENIZER_FOLDER,
    BlockEntry,
    FileEntry,
    Manifest,
    ShardEntry,
)
from quincunx.data_shards.shards import TAR_HEADER_BYTES, member_digest
from quincunx.data_shards.statistics_counter import StatisticsCounter

FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


class ShardWriter:
    """Packs the documents of one split of one task into blocks and shards `{split}-{task}-{part}.tar`.

    A block closes at the first document boundary at or beyond `block_samples` samples; a document that would stretch a
    block to twice that is cut there, and `num_lost_neighbours` counts the pair that the cut parts. A shard closes at
    the first block boundary at or beyond `shard_bytes`. `counter`, where given, counts every block.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        task: int,
        vocab_size: int,
        block_samples: int,
        shard_bytes: int,
        counter: StatisticsCounter | None,
    ):
        self.num_lost_neighbours = 0
        self.field_counts = dict.fromkeys(("passage", "next", "queries", "continuation"), 0)
        self.field_tokens = dict.fromkeys(FIELDS, 0)
        self.shards: list[ShardEntry] = []
        self._folder, self._split, self._task = folder, split, task
        self._vocab_size = vocab_size
        self._block_samples = block_samples
        self._shard_bytes = shard_bytes
        self._counter = counter
        self._pending: list[Sample] = []
        self._tar: _TarFile | None = None

    def add_document(self, samples: list[Sample]) -> None:
        """Samples of one document in reading order; each one's `has_next` is set here."""
        for i, sample in enumerate(samples):
            if len(self._pending) >= 2 * self._block_samples:
                self.num_lost_neighbours += 1
                self._close_block()
            self._pending.append(replace(sample, has_next=i + 1 < len(samples)))
        if len(self._pending) >= self._block_samples:
            self._close_block()

    def close(self) -> None:
        """Writes what is pending; after it, `shards` is complete."""
        if self._pending:
            self._close_block()
        if self._tar is not None:
            self._close_shard()

    def abandon(self) -> None:
        """Removes the unfinished file, for the way out after an error."""
        if self._tar is not None:
            self._tar.abandon()
            self._tar = None

    def _close_block(self) -> None:
        data = encode_block(self._pending, self._vocab_size)
        block = decode_block(data, check=False)
        self._count(block)
        ids = "\n".join(sample.passage_id for sample in self._pending).encode()
        assert ids.count(b"\n") == len(self._pending) - 1, "a passage id holds no line break"
        if self._tar is None:
            stem = f"{self._split}-{self._task:05d}-{len(self.shards):03d}"
            self._tar = _TarFile(self._folder / f"{stem}.tar", self._split)
        self._tar.add(data, ids, len(self._pending))
        self._pending = []
        if self._tar.bytes_so_far >= self._shard_bytes:
            self._close_shard()

    def _close_shard(self) -> None:
        self.shards.append(self._tar.close())
        self._tar = None

    def _count(self, block: Block) -> None:
        for row, name in enumerate(FIELDS):
            self.field_counts[name] += int((block.lengths[row] > 0).sum())
            self.field_tokens[name] += int(block.lengths[row].sum(dtype=np.int64))
        self.field_counts["next"] += int(block.has_next.sum())
        if self._counter is not None:
            self._counter.add_block(block)


class _TarFile:
    """One shard being written with webdataset's TarWriter, under a temporary name until it is whole."""

    def __init__(self, path: Path, split: str):
        from webdataset.writer import TarWriter

        self._path, self._split = path, split
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._file = _HashingFile(self._temporary)
        self._writer = TarWriter(self._file, user="", group="", mtime=0, encoder=False)
        self._writer.tarstream.format = tarfile.USTAR_FORMAT  # TarWriter takes `format` but does not pass it on
        self._blocks: list[BlockEntry] = []

    @property
    def bytes_so_far(self) -> int:
        return self._writer.tarstream.offset

    def add(self, block: bytes, ids: bytes, num_samples: int) -> None:
        stem = self._path.name.removesuffix(".tar")
        key = f"{stem}-{len(self._blocks):05d}"
        start = self._writer.tarstream.offset
        self._writer.write({"__key__": key, "block": block, "ids": ids})
        ids_start = start + TAR_HEADER_BYTES + -(-len(block) // 512) * 512
        entry = BlockEntry(
            offset=start + TAR_HEADER_BYTES,
            size=len(block),
            samples=num_samples,
            digest=member_digest(_tar_header(f"{key}.block", len(block)) + block),
            ids_offset=ids_start + TAR_HEADER_BYTES,
            ids_size=len(ids),
            ids_digest=member_digest(_tar_header(f"{key}.ids", len(ids)) + ids),
        )
        self._blocks.append(entry)

    def close(self) -> ShardEntry:
        self._writer.close()
        self._file.close()
        os.replace(self._temporary, self._path)
        return ShardEntry(
            name=self._path.name,
            split=self._split,
            bytes=self._file.size,
            samples=sum(block.samples for block in self._blocks),
            digest=self._file.digest.hexdigest(),
            blocks=tuple(self._blocks),
        )

    def abandon(self) -> None:
        self._file.file.close()
        self._temporary.unlink(missing_ok=True)


def _tar_header(name: str, size: int) -> bytes:
    """The 512 bytes that TarWriter puts before a member; a test compares them with the file's."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o444
    return info.tobuf(tarfile.USTAR_FORMAT)


class _HashingFile:
    """A file opened for writing that digests what passes through."""

    def __init__(self, path: Path):
        self.file = open(path, "wb")  # noqa: SIM115 - closed by close() or abandon()
        self.digest = xxhash.xxh3_128()
        self.size = 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.size += len(data)
        return self.file.write(data)

    def close(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()


@contextmanager
def full_disk_is_named(folder: Path):
    """Turns a full disk or quota into a DataError that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        raise DataError(
            f"the disk of {folder} is full ({error.strerror}): free space and run the same command again, what is "
            "finished is kept"
        ) from None


def write_file(path: Path, data: bytes) -> FileEntry:
    """Writes a file under a temporary name, syncs and renames it; returns its manifest entry."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with full_disk_is_named(path.parent):
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
    return FileEntry(path.name, len(data), xxhash.xxh3_128_hexdigest(data))


def write_shard_set(
    folder: str | Path,
    tokenizer_folder: str | Path,
    train: Iterable[list[Sample]],
    heldout: Iterable[list[Sample]] = (),
    *,
    max_tokens: int = 144,
    block_samples: int = DEFAULT_BLOCK_SAMPLES,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    num_buckets: int = DEFAULT_NUM_BUCKETS,
) -> Manifest:
    """Writes a whole shard set from documents in memory; a document is the list of its samples in reading order.

    The way for corpora that are tokenised already; launchers/build_shards.py is the way for texts. The tokenizer in
    `tokenizer_folder` (or any name that `load_tokenizer` takes) is copied into the set.

    Raises:
        DataError: no training samples, ids beyond the tokenizer's vocabulary, a full disk.
    """
    from quincunx.data_shards.tokenizer import load_tokenizer

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(str(tokenizer_folder))
    counter = StatisticsCounter(len(tokenizer), num_buckets)
    writers = {}
    for split, documents in zip(SPLITS, (train, heldout)):
        writers[split] = ShardWriter(
            folder, split, 0, len(tokenizer), block_samples, shard_bytes, counter if split == "train" else None
        )
        with full_disk_is_named(folder):
            for samples in documents:
                writers[split].add_document(samples)
            writers[split].close()
    shards = [shard for split in SPLITS for shard in writers[split].shards]
    check_training_shards(shards)
    return finish_shard_set(
        folder,
        tokenizer,
        counter,
        shards=shards,
        fields={split: writers[split].field_counts for split in SPLITS},
        max_tokens=max_tokens,
        settings={"block_samples": block_samples, "shard_bytes": shard_bytes, "num_buckets": num_buckets},
        counts={"lost_neighbours": sum(writer.num_lost_neighbours for writer in writers.values())},
    )


def check_training_shards(shards: list[ShardEntry]) -> None:
    """Raises DataError where no shard is of the train split."""
    if not any(shard.split == "train" for shard in shards):
        raise DataError("the corpus gives no training passage: check the input, or lower held_out_share")


def finish_shard_set(
    folder: Path,
    tokenizer,
    counter: StatisticsCounter,
    *,
    shards: list[ShardEntry],
    fields: dict[str, dict[str, int]],
    max_tokens: int,
    settings: dict,
    counts: dict[str, int],
    sources: Iterable[FileEntry] = (),
) -> Manifest:
    """Writes tokenizer, statistics and, last, the manifest beside shards that are already in `folder`."""
    from quincunx.data_shards.tokenizer import special_ids, tokenizer_digest

    tokenizer_folder = folder / TOKENIZER_FOLDER
    shutil.rmtree(tokenizer_folder, ignore_errors=True)  # the manifest lists every file: none may be left over
    tokenizer.save_pretrained(tokenizer_folder)
    manifest = Manifest(
        tokenizer_digest=tokenizer_digest(tokenizer),
        tokenizer_files=tuple(
            write_file(path, path.read_bytes()) for path in sorted(tokenizer_folder.iterdir()) if path.is_file()
        ),
        vocab_size=len(tokenizer),
        special_ids=special_ids(tokenizer),
        max_tokens=max_tokens,
        fields=fields,
        shards=tuple(shards),
        statistics=write_file(folder / STATISTICS_NAME, counter.to_bytes()),
        sources=tuple(sources),
        settings=settings,
        counts=counts,
    )
    write_file(folder / MANIFEST_NAME, manifest.to_json().encode())
    sync_folder(folder)
    return manifest


def sync_folder(folder: Path) -> None:
    """Makes renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
