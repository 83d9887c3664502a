"""A shard set opened for reading: manifest, statistics, and blocks, each compared with the manifest before it is used.

A block is about 1,024 tokenised samples, the unit that shards store, check and read (docs/shards.md shows one byte by
byte). A sample is a passage and what belongs to it, each text without [CLS] and closing [SEP]. Blocks of a split are
numbered through its shards in manifest order, and samples through the blocks (the global sample id). A block is read by
offset, never through a tar reader: a cut inside a tar header or a zero-filled shard gives tar readers fewer samples and
no error.
"""

import contextlib
import io
import json
import os
import struct
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
from cachetools import LRUCache, cachedmethod

from quincunx.data_shards.durable import written_whole
from quincunx.data_shards.errors import DataError
from quincunx.data_shards.shard_files import Files

FORMAT, SCHEMA_VERSION = "quincunx-shards", 1
MANIFEST_NAME, TOKENIZER_FOLDER = "manifest.json", "tokenizer"
SPLITS = ("train", "heldout")
TAR_HEADER_BYTES = 512
FIELDS = ("passage", "queries", "continuation")
"""The texts that every block has room for; a block of version 2 names further ones."""
HEADER = struct.Struct("<8sHHIIIQ")
"""Magic, version, bytes of a token id, samples, fields, bytes of the further fields' names, token ids."""
MAGIC, BLOCK_VERSION, CHECKSUM_BYTES = b"QXBLOCK\0", 2, 8
IDF_FLOOR = 0.01  # a word in every passage stays drawable, after all others
REMEDY = (
    "copy the file again, or delete a damaged shard and run the command in build.json again, which makes only what is "
    "missing (`python launchers/verify_shards.py` names all that is damaged)"
)
"""How to fix a damaged set, as the end of a sentence."""


class Text(NamedTuple):
    """token_ids: integers [n]; word_starts: bool [n], True if a token is the first of a word."""

    token_ids: np.ndarray
    word_starts: np.ndarray


@dataclass(frozen=True, eq=False)
class Block:
    """A decoded block of N samples with F fields; token_ids is a read-only view of the bytes.

    fields       F names, FIELDS first
    token_ids    uint16|uint32 [T], field by field
    offsets      int64 [F N + 1]: text f of sample i is token_ids[offsets[f N + i] : offsets[f N + i + 1]]
    word_starts  bool [T]
    has_next     bool [N], the next sample of the block is the next passage of the same document
    """

    fields: tuple[str, ...]
    token_ids: np.ndarray
    offsets: np.ndarray
    word_starts: np.ndarray
    has_next: np.ndarray

    @property
    def num_samples(self) -> int:
        return len(self.has_next)

    @property
    def nbytes(self) -> int:
        """Memory the arrays hold, in bytes."""
        return sum(array.nbytes for array in (self.token_ids, self.offsets, self.word_starts, self.has_next))

    def row(self, field_name: str | None) -> int:
        """Number f of a field, -1 if no sample of the block has it."""
        return self.fields.index(field_name) if field_name in self.fields else -1

    def text(self, field_name: str, index: int) -> Text:
        """The text of sample `index`; a missing text has no tokens."""
        row = self.row(field_name)
        at = row * self.num_samples + index
        span = slice(*self.offsets[at : at + 2]) if row >= 0 else slice(0)
        return Text(self.token_ids[span], self.word_starts[span])


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 if every id of the vocabulary fits, else uint32."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def decode_block(data: bytes) -> Block:
    """Views into `data`, which must stay unchanged.

    Raises:
        DataError: not a block, a newer block version, or a wrong checksum.
    """
    if len(data) < HEADER.size + CHECKSUM_BYTES or data[: len(MAGIC)] != MAGIC:
        raise DataError(f"is not a block: its {len(data)} bytes do not start with the header of one")
    _, version, token_bytes, num_samples, num_fields, name_bytes, num_tokens = HEADER.unpack_from(data)
    if version > BLOCK_VERSION:
        raise DataError(f"has block version {version}, this quincunx reads up to {BLOCK_VERSION}: update quincunx")
    stated = int.from_bytes(data[-CHECKSUM_BYTES:], "little")
    if xxhash.xxh3_64_intdigest(memoryview(data)[:-CHECKSUM_BYTES]) != stated:
        raise DataError("does not match its checksum")
    sizes = (name_bytes, 4 * num_fields * num_samples, token_bytes * num_tokens, -(-num_tokens // 8))
    names_at, lengths_at, tokens_at, starts_at, has_next_at = accumulate(sizes, initial=HEADER.size)
    fields = (*FIELDS, *bytes(data[names_at:lengths_at]).rstrip(b"\0").decode().split())
    lengths = np.frombuffer(data, "<i4", num_fields * num_samples, lengths_at)
    offsets = np.append(0, np.cumsum(lengths, dtype=np.int64))
    assert num_fields == len(fields) and offsets[-1] == num_tokens

    def bits(at: int, count: int) -> np.ndarray:
        packed = np.frombuffer(data, np.uint8, -(-count // 8), at)
        return np.unpackbits(packed, count=count, bitorder="little").view(bool)

    return Block(
        fields=fields,
        token_ids=np.frombuffer(data, f"<u{token_bytes}", num_tokens, tokens_at),
        offsets=offsets,
        word_starts=bits(starts_at, num_tokens),
        has_next=bits(has_next_at, num_samples),
    )


@dataclass(frozen=True)
class BlockEntry:
    """Where a block and its list of passage ids lie in their shard.

    An offset is that of a tar member's content; a digest is the xxh3_64 (16 hex digits) of the member's 512-byte tar
    header and its content.
    """

    offset: int
    size: int
    samples: int
    digest: str
    ids_offset: int
    ids_size: int
    ids_digest: str


@dataclass(frozen=True)
class ShardEntry:
    """One tar file of a split; `digest` is the xxh3_128 of the whole file (32 hex digits)."""

    name: str
    split: str
    bytes: int
    samples: int
    digest: str
    blocks: tuple[BlockEntry, ...]

    @staticmethod
    def from_json(content: dict[str, Any]) -> "ShardEntry":
        """Of a shard in JSON, whose blocks are lists; raises TypeError or KeyError for anything else."""
        return ShardEntry(**content | {"blocks": tuple(BlockEntry(*block) for block in content["blocks"])})


@dataclass(frozen=True)
class FileEntry:
    """A file beside the shards (statistics, tokenizer) or a source of the corpus."""

    name: str
    bytes: int
    digest: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a shard set holds, byte for byte: nothing that differs between two builds of one corpus with one setting.

    special_ids   what `tokenizer.special_ids` gives: cls, sep, mask, pad, unk, and all special ids
    fields        split -> passage, next, queries, continuation -> number of samples that have it
    settings      every setting of the build that decides content
    counts        documents, passages, tokens, lost neighbours and what else the build counted
    """

    tokenizer_digest: str
    tokenizer_files: tuple[FileEntry, ...]
    vocab_size: int
    special_ids: dict[str, Any]
    max_tokens: int
    fields: dict[str, dict[str, int]]
    shards: tuple[ShardEntry, ...]
    statistics: FileEntry
    sources: tuple[FileEntry, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    @property
    def dataset_id(self) -> str:
        """xxh3_128 of the canonical JSON, 32 hex digits; checkpoints and models carry it."""
        return xxhash.xxh3_128_hexdigest(json.dumps(asdict(self), sort_keys=True, separators=(",", ":")).encode())

    @property
    def files(self) -> dict[str, ShardEntry | FileEntry]:
        """Every file of the set but the manifest, by its name in the folder."""
        beside = {f"{TOKENIZER_FOLDER}/{entry.name}": entry for entry in self.tokenizer_files}
        return {entry.name: entry for entry in (*self.shards, self.statistics)} | beside

    def num_samples(self, split: str) -> int:
        return sum(shard.samples for shard in self.shards if shard.split == split)

    @staticmethod
    def from_json(text: str, path: str) -> "Manifest":
        """Reads and checks a manifest; `path` is for messages.

        Raises:
            DataError: not a manifest of ours, a newer schema, or content that does not match its dataset id.
        """
        remedy = "copy the shard set again, or build it with --remake"
        try:
            content = json.loads(text)
            if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
                raise DataError(f"{path} is not a quincunx manifest: give the folder that build_shards.py wrote")
            if content["schema_version"] > SCHEMA_VERSION:
                raise DataError(
                    f"{path} has schema version {content['schema_version']}, this quincunx reads up to "
                    f"{SCHEMA_VERSION}: update quincunx, or build the shards with this version and --remake"
                )
            stated_id = content.pop("dataset_id")
            content["shards"] = tuple(map(ShardEntry.from_json, content["shards"]))
            for name in ("tokenizer_files", "sources"):
                content[name] = tuple(FileEntry(**entry) for entry in content[name])
            content["statistics"] = FileEntry(**content["statistics"])
            manifest = Manifest(**content)
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise DataError(f"{path} is damaged ({error}): {remedy}") from None
        if manifest.dataset_id != stated_id:
            raise DataError(f"{path} does not match its own dataset id {stated_id}: it was edited or damaged; {remedy}")
        return manifest


@dataclass(frozen=True, eq=False)
class Statistics:
    """Frequencies over `num_passages` passages of the train split: for TF-IDF keywords and the unigram yardstick.

    token_counts        int64 [vocab_size]: occurrences of each token id in the passages
    document_frequency  uint32 [vocab_size + num_buckets]: passages that hold a word of the slot (hashing.word_slot)
    """

    num_passages: int
    token_counts: np.ndarray
    document_frequency: np.ndarray

    @property
    def idf(self) -> np.ndarray:
        """float32 [vocab_size + num_buckets]: max(log((num_passages + 1) / (df + 1)), 0.01)."""
        ratio = (self.num_passages + 1) / (self.document_frequency.astype(np.float64) + 1)
        return np.maximum(np.log(ratio), IDF_FLOOR).astype(np.float32)

    @staticmethod
    def from_bytes(data: bytes) -> "Statistics":
        """Reads statistics.npz."""
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            return Statistics(int(arrays["num_passages"]), arrays["token_counts"], arrays["document_frequency"])


def open_shards(
    path: str | Path,
    cache_dir: str | None = None,
    cache_bytes: int = 64 * 2**30,
    block_cache_bytes: int = 2 * 2**30,
) -> "ShardSet":
    """Opens the shard set in a folder or at a URL that fsspec knows.

    cache_dir, cache_bytes: the cache of remote bytes on this machine, shared by its processes (default:
        $QUINCUNX_CACHE, else ~/.cache/quincunx).
    block_cache_bytes: decoded blocks that this process keeps in memory.

    Raises:
        DataError: no manifest there, a manifest that is foreign, damaged or of a newer version, a local file that is
            missing or has another size, or a damaged statistics or tokenizer file.
        SettingsError: a cache folder that cannot be made, or a URL that fsspec cannot open.
    """
    files = Files(os.fspath(path), cache_dir, cache_bytes)
    manifest = read_manifest(files)
    if files.folder:
        check_sizes(files.folder, manifest)
    return ShardSet(files, manifest, block_cache_bytes)


def read_manifest(files: Files) -> Manifest:
    """The manifest of a shard set; raises DataError if there is none, or one that cannot be used."""
    data = files.read_all(MANIFEST_NAME)
    if data is None:
        raise DataError(
            f"{files.root} has no {MANIFEST_NAME}: it is not a finished shard set; run launchers/build_shards.py (an "
            "interrupted build continues with the same command)"
        )
    return Manifest.from_json(data.decode("utf-8", "replace"), f"{files.root}/{MANIFEST_NAME}")


def check_sizes(folder: Path, manifest: Manifest) -> None:
    """Raises DataError naming every file of a local set that is missing or has another size."""
    wrong = []
    for name, entry in manifest.files.items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found is None:
            wrong.append(f"{name} in {folder} is missing")
        elif found != entry.bytes:
            blocks = getattr(entry, "blocks", ())
            cut = next((f" (damaged from block {i} on)" for i, b in enumerate(blocks) if b.offset + b.size > found), "")
            wrong.append(f"{name} in {folder} has {found} bytes, the manifest says {entry.bytes}{cut}")
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

    def __init__(self, files: Files, manifest: Manifest, block_cache_bytes: int):
        self.path, self.manifest = files.root, manifest
        self._files = files
        self._blocks = LRUCache(block_cache_bytes, getsizeof=lambda block: block.nbytes)
        self._lock = threading.Lock()
        self._entries = {
            split: [(s.name, i, block) for s in manifest.shards if s.split == split for i, block in enumerate(s.blocks)]
            for split in SPLITS
        }
        companions = {}
        for name, entry in manifest.files.items():
            if isinstance(entry, FileEntry):
                with self._named(name):
                    companions[name] = files.read(name, 0, entry.bytes, entry.digest)
        self.statistics = Statistics.from_bytes(companions.pop(manifest.statistics.name))
        assert len(self.statistics.token_counts) == manifest.vocab_size
        if files.folder:
            self.tokenizer_folder = str(files.folder / TOKENIZER_FOLDER)
        else:
            self.tokenizer_folder = str(files.cache / f"tokenizer-{manifest.dataset_id}")
            for name, content in companions.items():
                with written_whole(Path(self.tokenizer_folder, Path(name).name), "wb") as file:
                    file.write(content)

    def num_blocks(self, split: str) -> int:
        return len(self._entries[split])

    def num_samples(self, split: str) -> int:
        return self.manifest.num_samples(split)

    def block_samples(self, split: str) -> np.ndarray:
        """Samples of each block in global order, int64 [num_blocks]."""
        return np.array([entry.samples for _, _, entry in self._entries[split]], np.int64)

    @cachedmethod(attrgetter("_blocks"), lock=attrgetter("_lock"))
    def read_block(self, split: str, index: int) -> Block:
        """Block `index` of a split, its bytes compared with the manifest, its ids with the vocabulary.

        Raises:
            DataError: names shard, block, what is wrong with it, and the remedy.
        """
        shard, number, entry = self._entries[split][index]
        with self._named(f"block {number} of shard {shard}"):
            block = decode_block(self._read_member(shard, entry.offset, entry.size, entry.digest))
            if (highest := int(block.token_ids.max())) >= self.manifest.vocab_size:
                raise DataError(f"holds token id {highest} beyond the vocabulary of {self.manifest.vocab_size}")
        return block

    def passage_ids(self, split: str, index: int) -> list[str]:
        """The corpus's own ids of the passages of a block."""
        shard, number, entry = self._entries[split][index]
        with self._named(f"block {number} of shard {shard}"):
            content = self._read_member(shard, entry.ids_offset, entry.ids_size, entry.ids_digest)
        return bytes(content).decode().split("\n")

    def _read_member(self, shard: str, offset: int, size: int, digest: str) -> memoryview:
        """The content of a tar member, after its header and content have been compared with the manifest."""
        data = self._files.read(shard, offset - TAR_HEADER_BYTES, size + TAR_HEADER_BYTES, digest)
        return memoryview(data)[TAR_HEADER_BYTES:]

    @contextlib.contextmanager
    def _named(self, what: str) -> Iterator[None]:
        """Has a DataError say what is wrong and how to fix it."""
        try:
            yield
        except DataError as error:
            raise DataError(f"{what} in {self.path} {error}: {REMEDY}") from None
