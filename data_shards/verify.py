"""Re-checks a finished shard set against its manifest, every byte of it."""

import io
import json
import shlex
import tarfile
from dataclasses import dataclass

import xxhash
from tqdm import tqdm

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
    check_ids,
    decode_block,
    read_manifest,
)
from quincunx.data_shards.tokenizer import load_tokenizer, tokenizer_digest


@dataclass(frozen=True)
class Report:
    """What `verify_shards` found.

    problems  what is wrong with each file, by name; [] if it is sound
    command   what built the set, "" if that is not known
    """

    manifest: Manifest
    problems: dict[str, list[str]]
    command: str

    @property
    def damaged(self) -> dict[str, list[str]]:
        return {name: found for name, found in self.problems.items() if found}


def verify_shards(path: str) -> Report:
    """Reads every byte of the set in a folder or at a URL, past any cache; shows a progress bar on a terminal.

    Checks sizes and digests of all files, each block's decoding, ids, samples and passage ids, the tar structure,
    the statistics against a recount, and the tokenizer's digest.

    Raises:
        DataError: no manifest, or one that cannot be used.
    """
    files = Files(path)
    manifest = read_manifest(files)
    counter = StatisticsCounter(manifest.vocab_size, int(manifest.settings["num_buckets"]))
    problems: dict[str, list[str]] = {}
    for name, entry in tqdm(manifest.files.items(), desc="verify", unit="file", disable=None):
        data = files.read_all(name)
        if data is None:
            problems[name] = ["is missing"]
        elif isinstance(entry, ShardEntry):
            problems[name] = check_shard(data, entry, manifest.vocab_size, counter)
        else:
            problems[name] = check_bytes(data, entry)
        if entry is manifest.statistics and not any(problems.values()) and counter.to_bytes() != data:
            problems[name] = ["differs from a recount over the shards"]
    if files.folder and not any(found for name, found in problems.items() if name.startswith(TOKENIZER_FOLDER)):
        digest = tokenizer_digest(load_tokenizer(str(files.folder / TOKENIZER_FOLDER)))
        other = ["loads with another digest than the manifest's"] * (digest != manifest.tokenizer_digest)
        problems[f"{TOKENIZER_FOLDER} (as loaded)"] = other
    command = ""
    if (record := files.read_all("build.json")) is not None:
        try:
            command = shlex.join(json.loads(record)["command"])
        except (ValueError, KeyError, TypeError):
            problem = "is damaged, so how the set was built is not known: copy it again, or build the set anew"
            problems["build.json"] = [problem]
    return Report(manifest, problems, command)


def check_bytes(data: bytes, entry: ShardEntry | FileEntry) -> list[str]:
    """What is wrong with the bytes of a file as a whole."""
    if len(data) != entry.bytes:
        return [f"has {len(data)} bytes, the manifest says {entry.bytes}"]
    return ["does not match its digest"] * (xxhash.xxh3_128_hexdigest(data) != entry.digest)


def check_shard(data: bytes, shard: ShardEntry, vocab_size: int, counter: StatisticsCounter) -> list[str]:
    """What is wrong with the bytes of a shard, block by block; sound training blocks are counted in `counter`."""
    problems = []
    for number, entry in enumerate(shard.blocks):
        try:
            block = check_block(data, entry, vocab_size)
        except DataError as error:
            problems.append(f"block {number} {error}")
        else:
            if shard.split == "train":
                counter.add_block(block)
    if len(data) != shard.bytes or not problems:
        problems = check_bytes(data, shard) + problems
    if not problems:
        spans = [((entry.offset, entry.size), (entry.ids_offset, entry.ids_size)) for entry in shard.blocks]
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            if [(member.offset_data, member.size) for member in tar] != [span for pair in spans for span in pair]:
                problems.append("lists other tar members than its manifest entry")
    return problems


def check_block(data: bytes, entry: BlockEntry, vocab_size: int) -> Block:
    """The decoded block; raises DataError with what is wrong."""
    ids = (entry.ids_offset, entry.ids_size, entry.ids_digest)
    for offset, size, digest in ((entry.offset, entry.size, entry.digest), ids):
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
    check_ids(block, vocab_size)
    num_ids = data[entry.ids_offset : entry.ids_offset + entry.ids_size].count(b"\n") + 1
    if num_ids != entry.samples:
        raise DataError(f"has {num_ids} passage ids for {entry.samples} samples")
    return block
