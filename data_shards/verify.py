"""Compares every byte of a finished shard set with its manifest."""

import json
import shlex

import xxhash

from quincunx.data_shards.errors import DataError
from quincunx.data_shards.shard_files import Files
from quincunx.data_shards.shards import TAR_HEADER_BYTES, FileEntry, ShardEntry, read_manifest


def verify_shards(path: str) -> None:
    """Reads the set in a folder or at a URL, past any cache; prints what is wrong with each file.

    Raises:
        DataError: no manifest, or one that cannot be used; damaged files, all named.
    """
    files = Files(path)
    manifest = read_manifest(files)
    damaged, command = [], ""
    for name, entry in manifest.files.items():
        problem = find_damage(files.read_all(name), entry)
        print(f"{name} ({entry.bytes:,} bytes) {f'is DAMAGED: it {problem}' if problem else 'is ok'}", flush=True)
        damaged += [name] * bool(problem)
    if (record := files.read_all("build.json")) is not None:
        try:
            command = shlex.join(json.loads(record)["command"])
        except (ValueError, KeyError, TypeError):
            print("build.json is damaged, so how the set was built is not known: copy it again, or build the set anew")
            damaged.append("build.json")
    print(
        f"{len(manifest.files)} files, {len(damaged)} damaged; {manifest.num_samples('train'):,} training and "
        f"{manifest.num_samples('heldout'):,} held-out samples; dataset id {manifest.dataset_id}"
    )
    if damaged:
        rebuild = (
            f", or delete the damaged shards and run `{command}` again, which makes only these (with --remake, the "
            "whole set)"
        )
        raise DataError(f"{path} is damaged in {', '.join(damaged)}: copy them again{rebuild if command else ''}")


def find_damage(data: bytes | None, entry: ShardEntry | FileEntry) -> str:
    """What is wrong with the bytes of a file, and in which blocks of a shard; "" if it is sound."""
    if data is None:
        return "is missing"
    if len(data) == entry.bytes and xxhash.xxh3_128_hexdigest(data) == entry.digest:
        return ""
    blocks = []
    for number, block in enumerate(entry.blocks if isinstance(entry, ShardEntry) else ()):
        found = data[block.offset - TAR_HEADER_BYTES : block.offset + block.size]
        ids = data[block.ids_offset - TAR_HEADER_BYTES : block.ids_offset + block.ids_size]
        if [xxhash.xxh3_64_hexdigest(member) for member in (found, ids)] != [block.digest, block.ids_digest]:
            blocks.append(str(number))
    problem = f"has {len(data)} bytes, the manifest says {entry.bytes}"
    if len(data) == entry.bytes:
        problem = "does not match its digest"
    return f"{problem}; damaged blocks: {', '.join(blocks)}" if blocks else problem
