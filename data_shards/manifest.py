"""manifest.json: what a shard set holds, byte for byte, written last.

A folder without a manifest is not a shard set. The manifest names every shard and block with size and digest, so a
reader trusts nothing it has not compared. It holds nothing that differs between two builds of the same corpus with the
same settings (no path, no time, no worker count): the dataset id is the digest of its canonical JSON, and checkpoints
and models carry it. build.json beside it says where and how the set was built (docs/shards.md).
"""

import json
from dataclasses import asdict, astuple, dataclass, field
from typing import Any

import xxhash

from quincunx.data_shards.errors import DataError

FORMAT = "quincunx-shards"
SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
BUILD_NAME = "build.json"
STATISTICS_NAME = "statistics.npz"
TOKENIZER_FOLDER = "tokenizer"
SPLITS = ("train", "heldout")
TAR_HEADER_BYTES = 512
DEFAULT_BLOCK_SAMPLES = 1024
DEFAULT_SHARD_BYTES = 256 * 2**20
DEFAULT_NUM_BUCKETS = 2**20


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


@dataclass(frozen=True)
class FileEntry:
    """A file beside the shards (statistics, tokenizer) or a source of the corpus."""

    name: str
    bytes: int
    digest: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """See the fields; `to_json` and `from_json` are inverse, and `dataset_id` names the content.

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
        """xxh3_128 of the canonical JSON, 32 hex digits."""
        return xxhash.xxh3_128_hexdigest(json.dumps(asdict(self), sort_keys=True, separators=(",", ":")).encode())

    def num_samples(self, split: str) -> int:
        return sum(shard.samples for shard in self.shards if shard.split == split)

    def to_json(self) -> str:
        """The text of manifest.json: one line per shard, the rest indented, the dataset id first."""
        content = asdict(self)
        del content["shards"]
        head = {"format": FORMAT, "dataset_id": self.dataset_id, **content}
        lines = ",\n".join("  " + json.dumps(shard_to_json(shard)) for shard in self.shards)
        return json.dumps(head, indent=1)[:-2] + f',\n "shards": [\n{lines}\n ]\n}}\n'

    @staticmethod
    def from_json(text: str, path: str) -> "Manifest":
        """Reads and checks a manifest; `path` is for messages.

        Raises:
            DataError: not a manifest of ours, a newer schema, or content that does not match its dataset id.
        """
        try:
            content = json.loads(text)
        except ValueError as error:
            raise DataError(
                f"{path} is not JSON ({error}): copy the shard set again, or build it with --remake"
            ) from None
        if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
            raise DataError(f"{path} is not a quincunx manifest: give the folder that build_shards.py wrote")
        version = content.get("schema_version")
        if not isinstance(version, int) or version > SCHEMA_VERSION:
            raise DataError(
                f"{path} has schema version {version}, this quincunx reads up to {SCHEMA_VERSION}: update quincunx, "
                "or build the shards with this version and --remake"
            )
        try:
            stated_id = content.pop("dataset_id")
            content["shards"] = tuple(map(shard_from_json, content["shards"]))
            for name in ("tokenizer_files", "sources"):
                content[name] = tuple(FileEntry(**entry) for entry in content[name])
            content["statistics"] = FileEntry(**content["statistics"])
            manifest = Manifest(**content)
        except (KeyError, TypeError) as error:
            raise DataError(
                f"{path} is damaged ({error}): copy the shard set again, or build it with --remake"
            ) from None
        if manifest.dataset_id != stated_id:
            raise DataError(
                f"{path} does not match its own dataset id {stated_id}: it was edited or damaged; copy the shard "
                "set again, or build it with --remake"
            )
        return manifest


def shard_to_json(shard: ShardEntry) -> dict[str, Any]:
    """A shard's entry with each block as a list, in the order of BlockEntry's fields."""
    return asdict(shard) | {"blocks": [list(astuple(block)) for block in shard.blocks]}


def shard_from_json(content: dict[str, Any]) -> ShardEntry:
    """Inverse of shard_to_json; raises TypeError or KeyError for anything else."""
    return ShardEntry(**content | {"blocks": tuple(BlockEntry(*block) for block in content["blocks"])})
