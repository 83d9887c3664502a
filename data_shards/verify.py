"""Re-checks a finished shard set against its manifest, every byte of it."""

import io
import json
import shlex
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import xxhash

from quincunx.data_shards.errors import DataError
from quincunx.data_shards.shard_files import Files
from quincunx.data_shards.shard_writer import StatisticsCounter
from quincunx.data_shards.shards import (
    TAR_HEADER_BYTES,
    TOKENIZER_FOLDER,
    Block,
    BlockEntry,
    FileEntry,
    Manifest,
    ShardEntry,
    decode_block,
    read_manifest,
)
from quincunx.data_shards.tokenizer import load_tokenizer, special_ids, tokenizer_digest


@dataclass(frozen=True)
class Finding:
    """The state of one file of a set: `problems` is empty if it is sound."""

    name: str
    bytes: int
    blocks: int
    samples: int
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """What `verify_shards` found; `command` is what built the set, "" if that is not known."""

    manifest: Manifest
    findings: tuple[Finding, ...]
    command: str

    @property
    def damaged(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.problems)


def verify_shards(path: str, say: Callable[[str], None] = lambda name: None) -> Report:
    """Reads every byte of the set in a folder or at a URL, past any cache.

    Checks sizes and digests of all files, each block's decoding, ids, samples and passage ids, the tar structure,
    the statistics against a recount, and the tokenizer's digest. `say` is called with each shard's name before it is
    read.

    Raises:
        DataError: no manifest, or one that cannot be used.
    """
    files = Files(path)
    manifest = read_manifest(files)
    counter = StatisticsCounter(manifest.vocab_size, int(manifest.settings["num_buckets"]))
    findings = []
    for shard in manifest.shards:
        say(shard.name)
        data = files.read_all(shard.name)
        problems = ["is missing"] if data is None else check_shard(data, shard, manifest.vocab_size, counter)
        findings.append(Finding(shard.name, shard.bytes, len(shard.blocks), shard.samples, tuple(problems)))
    sound = not any(finding.problems for finding in findings)
    for entry in manifest.tokenizer_files:
        name = f"{TOKENIZER_FOLDER}/{entry.name}"
        findings.append(Finding(name, entry.bytes, 0, 0, _check_file(files.read_all(name), entry)))
    tokenizer_is_whole = not any(f.problems for f in findings if f.name.startswith(TOKENIZER_FOLDER))
    statistics = manifest.statistics
    problems = _check_file(files.read_all(statistics.name), statistics)
    if sound and not problems and xxhash.xxh3_128_hexdigest(counter.to_bytes()) != statistics.digest:
        problems = ("differs from a recount over the shards",)
    findings.append(Finding(statistics.name, statistics.bytes, 0, 0, problems))
    if files.folder and tokenizer_is_whole:
        findings.append(_check_tokenizer(files.folder / TOKENIZER_FOLDER, manifest))
    command = ""
    if (record := files.read_all("build.json")) is not None:
        try:
            command = shlex.join(json.loads(record)["command"])
        except (ValueError, KeyError, TypeError):
            problem = "is damaged, so how the set was built is not known: copy it again, or build the set anew"
            findings.append(Finding("build.json", 0, 0, 0, (problem,)))
    return Report(manifest, tuple(findings), command)


def check_shard(data: bytes, shard: ShardEntry, vocab_size: int, counter: StatisticsCounter) -> list[str]:
    """What is wrong with the bytes of a shard, block by block; sound training blocks are counted in `counter`."""
    problems = []
    if len(data) != shard.bytes:
        problems.append(f"has {len(data)} bytes, the manifest says {shard.bytes}")
    for number, entry in enumerate(shard.blocks):
        try:
            block = _check_block(data, entry, vocab_size)
        except DataError as error:
            problems.append(f"block {number} {error}")
            continue
        if shard.split == "train":
            counter.add_block(block)
    if sum(block.samples for block in shard.blocks) != shard.samples:
        problems.append(f"is said to hold {shard.samples} samples, its blocks hold another number")
    if not problems and xxhash.xxh3_128_hexdigest(data) != shard.digest:
        problems.append("differs from its digest between its blocks")
    if not problems:
        problems += _check_tar(data, shard)
    return problems


def _check_block(data: bytes, entry: BlockEntry, vocab_size: int) -> Block:
    """The decoded block; raises DataError with what is wrong."""
    for offset, size, digest in (
        (entry.offset, entry.size, entry.digest),
        (entry.ids_offset, entry.ids_size, entry.ids_digest),
    ):
        member = data[offset - TAR_HEADER_BYTES : offset + size]
        if len(member) != size + TAR_HEADER_BYTES:
            raise DataError("is cut off")
        if not any(member):
            raise DataError("is filled with zeros")
        if xxhash.xxh3_64_hexdigest(member) != digest:
            raise DataError("does not match its digest")
    block = decode_block(data[entry.offset : entry.offset + entry.size])
    if block.num_samples != entry.samples:
        raise DataError(f"holds {block.num_samples} samples, the manifest says {entry.samples}")
    if int(block.token_ids.max()) >= vocab_size:
        raise DataError(f"holds token id {int(block.token_ids.max())} beyond the vocabulary of {vocab_size}")
    num_ids = data[entry.ids_offset : entry.ids_offset + entry.ids_size].count(b"\n") + 1
    if num_ids != entry.samples:
        raise DataError(f"has {num_ids} passage ids for {entry.samples} samples")
    return block


def _check_tar(data: bytes, shard: ShardEntry) -> list[str]:
    """Whether a tar reader finds exactly the members that the manifest names."""
    expected = [
        span for block in shard.blocks for span in ((block.offset, block.size), (block.ids_offset, block.ids_size))
    ]
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        found = [(member.offset_data, member.size) for member in tar]
    return [] if found == expected else ["lists other tar members than its manifest entry"]


def _check_file(data: bytes | None, entry: FileEntry) -> tuple[str, ...]:
    if data is None:
        return ("is missing",)
    if len(data) != entry.bytes:
        return (f"has {len(data)} bytes, the manifest says {entry.bytes}",)
    return ("does not match its digest",) * (xxhash.xxh3_128_hexdigest(data) != entry.digest)


def _check_tokenizer(folder: Path, manifest: Manifest) -> Finding:
    """Whether the tokenizer in the set, loaded as training loads it, is the one that the manifest names."""
    tokenizer = load_tokenizer(str(folder))
    problems = []
    if tokenizer_digest(tokenizer) != manifest.tokenizer_digest:
        problems.append("loads with another digest than the manifest's")
    if special_ids(tokenizer) != manifest.special_ids or len(tokenizer) != manifest.vocab_size:
        problems.append("has other special ids or another vocabulary size than the manifest")
    return Finding(f"{TOKENIZER_FOLDER} (as loaded)", 0, 0, 0, tuple(problems))
