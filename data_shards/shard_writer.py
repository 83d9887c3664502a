"""Writes shards: documents of samples in, tar files and their manifest entries out.

The bytes depend on the samples alone: USTAR members in sorted order, mtime 0, uid 0, no names of users. A file appears
under its final name only when it is complete and on disk.
"""

import io
import json
import shutil
import struct
import tarfile
from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from quincunx.data_shards.durable import file_digest, sync_folder, written_whole
from quincunx.data_shards.errors import DataError
from quincunx.data_shards.hashing import compiled, word_slot
from quincunx.data_shards.shards import (
    FIELDS,
    FORMAT,
    HEADER,
    MAGIC,
    MANIFEST_NAME,
    TAR_HEADER_BYTES,
    TOKENIZER_FOLDER,
    Block,
    BlockEntry,
    FileEntry,
    Manifest,
    ShardEntry,
    Statistics,
    Text,
    decode_block,
    token_dtype,
)
from quincunx.data_shards.tokenizer import special_ids, tokenizer_digest


class Sample:
    """A passage and its companions, by field; `has_next`: the next sample is the document's next passage.

    A field beyond queries and continuation is given by its name: Sample("id", passage, summary=text).
    """

    def __init__(
        self,
        passage_id: str,
        passage: Text,
        queries: Text | None = None,
        continuation: Text | None = None,
        *,
        has_next: bool = False,
        **further: Text | None,
    ):
        self.passage_id, self.has_next = passage_id, has_next
        texts = {"passage": passage, "queries": queries, "continuation": continuation, **further}
        self.texts = {name: text for name, text in texts.items() if text is not None}


def encode_block(samples: list[Sample], vocab_size: int) -> bytes:
    """The bytes of one block (docs/shards.md); the same samples give the same bytes.

    Raises:
        DataError: a passage without tokens, or an id outside [0, vocab_size).
    """
    for sample in samples:
        if len(sample.texts["passage"].token_ids) == 0:
            raise DataError(f"passage {sample.passage_id!r} has no tokens: remove it from the corpus")
    further = sorted({name for sample in samples for name in sample.texts} - set(FIELDS))
    names = "\n".join(further).encode()
    names += bytes(-len(names) % 8)
    missing = Text(np.empty(0, np.int64), np.empty(0, bool))
    texts = [sample.texts.get(name, missing) for name in (*FIELDS, *further) for sample in samples]
    lengths = np.array([len(text.token_ids) for text in texts], "<i4")
    token_ids = np.concatenate([text.token_ids for text in texts])
    word_starts = np.concatenate([text.word_starts for text in texts])
    assert len(token_ids) == len(word_starts)
    if token_ids.min() < 0 or token_ids.max() >= vocab_size:
        worst = int(token_ids.max() if token_ids.max() >= vocab_size else token_ids.min())
        raise DataError(
            f"token id {worst} near passage {samples[0].passage_id!r} is outside the vocabulary of {vocab_size}: "
            "give the tokenizer that made the ids"
        )
    has_next = np.array([sample.has_next for sample in samples], bool)
    has_next[-1] = False  # a neighbour is looked up in the same block
    dtype, version, num_fields = token_dtype(vocab_size), 2 if further else 1, len(FIELDS) + len(further)
    body = b"".join(
        [
            HEADER.pack(MAGIC, version, dtype.itemsize, len(samples), num_fields, len(names), len(token_ids)),
            names,
            lengths.tobytes(),
            token_ids.astype(dtype).tobytes(),
            np.packbits(word_starts, bitorder="little").tobytes(),
            np.packbits(has_next, bitorder="little").tobytes(),
        ]
    )
    body += bytes(-len(body) % 8)
    return body + struct.pack("<Q", xxhash.xxh3_64_intdigest(body))


class StatisticsCounter:
    """Counts blocks of training passages; the order of the blocks does not matter."""

    def __init__(self, vocab_size: int, num_buckets: int):
        assert num_buckets > 0 and num_buckets & (num_buckets - 1) == 0, "num_buckets is a power of two"
        self.num_passages = 0
        self.num_buckets = num_buckets
        self.token_counts = np.zeros(vocab_size, np.int64)
        self.document_frequency = np.zeros(vocab_size + num_buckets, np.uint32)
        self._last_seen = np.full(vocab_size + num_buckets, -1, np.int64)

    def add_block(self, block: Block) -> None:
        _count_block(
            block.token_ids,
            block.word_starts,
            block.offsets[: block.num_samples + 1],
            self.num_buckets,
            self.num_passages,
            self.token_counts,
            self.document_frequency,
            self._last_seen,
        )
        self.num_passages += block.num_samples

    def add_statistics(self, part: Statistics) -> None:
        self.num_passages += part.num_passages
        self.token_counts += part.token_counts
        self.document_frequency += part.document_frequency

    def to_bytes(self) -> bytes:
        """statistics.npz; the same counts give the same bytes (stored members, zip's fixed date of 1980)."""
        buffer = io.BytesIO()
        np.savez(
            buffer,
            num_passages=np.int64(self.num_passages),
            token_counts=self.token_counts.astype("<i8"),
            document_frequency=self.document_frequency.astype("<u4"),
        )
        return buffer.getvalue()


@compiled
def _count_block(
    token_ids, word_starts, offsets, num_buckets, first_passage, token_counts, document_frequency, last_seen
):
    vocab_size = len(token_counts)
    for i in range(len(offsets) - 1):
        start, end = offsets[i], offsets[i + 1]
        word = start
        for j in range(start, end):
            token_counts[token_ids[j]] += 1
            if j + 1 == end or word_starts[j + 1]:
                slot = word_slot(token_ids, word, j + 1, vocab_size, num_buckets)
                if last_seen[slot] != first_passage + i:
                    last_seen[slot] = first_passage + i
                    document_frequency[slot] += 1
                word = j + 1


class ShardWriter:
    """Packs the documents of one split of one task into blocks and shards `{split}-{task}-{part}.tar`.

    A block closes at the first document boundary at or beyond `block_samples` samples; a document that would stretch a
    block to twice that is cut there, and `num_lost_neighbours` counts the pair that the cut parts. A shard closes at
    the first block boundary at or beyond `shard_bytes`. `counter` counts the training split's blocks.
    """

    def __init__(
        self, folder: Path, split: str, task: int, counter: StatisticsCounter, block_samples: int, shard_bytes: int
    ):
        self.num_lost_neighbours = 0
        self.field_counts = Counter(passage=0, next=0, queries=0, continuation=0)
        self.field_tokens = Counter(dict.fromkeys(FIELDS, 0))
        self.shards: list[ShardEntry] = []
        self._folder, self._split, self._task, self._counter = folder, split, task, counter
        self._block_samples, self._shard_bytes = block_samples, shard_bytes
        self._pending: list[Sample] = []
        self._tar: tarfile.TarFile | None = None

    def add_document(self, samples: list[Sample]) -> None:
        """Samples of one document in reading order; each one's `has_next` is set here."""
        for i, sample in enumerate(samples):
            if len(self._pending) >= 2 * self._block_samples:
                self.num_lost_neighbours += 1
                self._close_block()
            sample.has_next = i + 1 < len(samples)
            self._pending.append(sample)
        if len(self._pending) >= self._block_samples:
            self._close_block()

    def close(self) -> None:
        """Writes what is pending; after it, `shards` is complete."""
        if self._pending:
            self._close_block()
        if self._tar is not None:
            self._close_shard()

    def _close_block(self) -> None:
        data = encode_block(self._pending, len(self._counter.token_counts))
        block = decode_block(data)
        for name, lengths in zip(block.fields, np.diff(block.offsets).reshape(-1, block.num_samples)):
            self.field_counts[name] += int((lengths > 0).sum())
            self.field_tokens[name] += int(lengths.sum())
        self.field_counts["next"] += int(block.has_next.sum())
        if self._split == "train":
            self._counter.add_block(block)
        ids = "\n".join(sample.passage_id for sample in self._pending).encode()
        assert ids.count(b"\n") == len(self._pending) - 1, "a passage id holds no line break"
        if self._tar is None:
            self._path = self._folder / f"{self._split}-{self._task:05d}-{len(self.shards):03d}.tar"
            self._file = ExitStack()  # the shard takes its name when this is closed
            file = self._file.enter_context(written_whole(self._path, "wb"))
            self._tar = tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
            self._blocks: list[BlockEntry] = []
        key = f"{self._path.stem}-{len(self._blocks):05d}"
        offset, digest = self._add_member(f"{key}.block", data)
        ids_offset, ids_digest = self._add_member(f"{key}.ids", ids)
        entry = BlockEntry(offset, len(data), len(self._pending), digest, ids_offset, len(ids), ids_digest)
        self._blocks.append(entry)
        self._pending = []
        if self._tar.offset >= self._shard_bytes:
            self._close_shard()

    def _add_member(self, name: str, content: bytes) -> tuple[int, str]:
        """Offset of the content, and the digest of header and content."""
        info = tarfile.TarInfo(name)
        info.size, info.mode = len(content), 0o444
        offset = self._tar.offset + TAR_HEADER_BYTES
        self._tar.addfile(info, io.BytesIO(content))
        return offset, xxhash.xxh3_64_hexdigest(info.tobuf(tarfile.USTAR_FORMAT) + content)

    def _close_shard(self) -> None:
        self._tar.close()
        self._file.close()
        self._tar = None
        entry = ShardEntry(
            name=self._path.name,
            split=self._split,
            bytes=self._path.stat().st_size,
            samples=sum(block.samples for block in self._blocks),
            digest=file_digest(self._path),
            blocks=tuple(self._blocks),
        )
        self.shards.append(entry)


def finish_shard_set(
    folder: Path, tokenizer: Any, counter: StatisticsCounter, *, shards: list[ShardEntry], **content: Any
) -> Manifest:
    """Writes tokenizer, statistics and, last, the manifest beside shards that are already in `folder`.

    content: the manifest's fields, max_tokens, settings, counts and sources.

    Raises DataError if no shard is of the train split.
    """
    if not any(shard.split == "train" for shard in shards):
        raise DataError("the corpus gives no training passage: check the input, or lower held_out_share")
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
        shards=tuple(shards),
        statistics=write_file(folder / "statistics.npz", counter.to_bytes()),
        **content,
    )
    write_file(folder / MANIFEST_NAME, manifest_text(manifest).encode())
    sync_folder(folder)
    return manifest


def manifest_text(manifest: Manifest) -> str:
    """The text of manifest.json: one line a shard, the rest indented, the dataset id first."""
    content = asdict(manifest)
    del content["shards"]
    head = {"format": FORMAT, "dataset_id": manifest.dataset_id, **content}
    lines = ",\n".join("  " + json.dumps(shard_to_json(shard)) for shard in manifest.shards)
    return json.dumps(head, indent=1)[:-2] + f',\n "shards": [\n{lines}\n ]\n}}\n'


def shard_to_json(shard: ShardEntry) -> dict[str, Any]:
    """A shard's entry with each block as a list, in the order of BlockEntry's fields; ShardEntry.from_json reads it."""
    return asdict(shard) | {"blocks": [list(astuple(block)) for block in shard.blocks]}


def write_file(path: Path, data: bytes) -> FileEntry:
    """Writes a file whole or not at all; returns its manifest entry."""
    with written_whole(path, "wb") as file:
        file.write(data)
    return FileEntry(path.name, len(data), xxhash.xxh3_128_hexdigest(data))
