"""Re-checks a finished shard set against its manifest, and rebuilds what is damaged from the corpus it came from."""

import contextlib
import io
import json
import os
import shlex
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from quincunx.data_shards.block import decode_block
from quincunx.data_shards.errors import DataError
from quincunx.data_shards.manifest import (
    BUILD_NAME,
    TOKENIZER_FOLDER,
    BlockEntry,
    FileEntry,
    Manifest,
    ShardEntry,
)
from quincunx.data_shards.remote import LocalFiles, RemoteFiles, open_files
from quincunx.data_shards.shards import TAR_HEADER_BYTES, member_digest, read_manifest
from quincunx.data_shards.statistics_counter import StatisticsCounter


@dataclass(frozen=True)
class Finding:
    """The state of one file of a set: `problems` is empty where it is sound."""

    name: str
    bytes: int
    blocks: int
    samples: int
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """What `verify_shards` found; `command` is what built the set, "" where that is not known."""

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
    files = open_files(path, None, 1)
    manifest = read_manifest(files)
    counter = StatisticsCounter(manifest.vocab_size, int(manifest.settings["num_buckets"]))
    findings = []
    for shard in manifest.shards:
        say(shard.name)
        data = files.read_all(shard.name)
        problems = ["is missing"] if data is None else check_shard(data, shard, manifest.vocab_size, counter)
        findings.append(Finding(shard.name, shard.bytes, len(shard.blocks), shard.samples, tuple(problems)))
    sound = not any(finding.problems for finding in findings)
    for entry, folder in [(entry, TOKENIZER_FOLDER) for entry in manifest.tokenizer_files] + [
        (manifest.statistics, "")
    ]:
        name = f"{folder}/{entry.name}" if folder else entry.name
        problems = _check_file(files.read_all(name), entry)
        if entry is manifest.statistics and sound and not problems:
            recount = xxhash.xxh3_128_hexdigest(counter.to_bytes())
            problems += ["differs from a recount over the shards"] * (recount != entry.digest)
        findings.append(Finding(name, entry.bytes, 0, 0, tuple(problems)))
    if isinstance(files, LocalFiles) and not any(f.problems for f in findings if f.name.startswith(TOKENIZER_FOLDER)):
        findings.append(_check_tokenizer(Path(files.root, TOKENIZER_FOLDER), manifest))
    command = ""
    try:
        if record := read_record(files):
            command = shlex.join(record["command"])
    except DataError as error:
        findings.append(Finding(BUILD_NAME, 0, 0, 0, (str(error),)))
    return Report(manifest, tuple(findings), command)


def read_record(files: LocalFiles | RemoteFiles) -> dict[str, Any] | None:
    """build.json with its keys command, folder and settings, among others; None where the set has none.

    Raises:
        DataError: it is damaged; the message goes on from the file's name.
    """
    data = files.read_all(BUILD_NAME)
    if data is None:
        return None
    try:
        record = json.loads(data)
        sound = isinstance(record["folder"], str) and isinstance(record["settings"], dict)
        sound = sound and all(isinstance(word, str) for word in record["command"])
    except (ValueError, KeyError, TypeError):
        sound = False
    if not sound:
        raise DataError(
            "is damaged, so how the set was built is not known: copy it again, or build the set anew with --overwrite"
        )
    return record


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


def _check_block(data: bytes, entry: BlockEntry, vocab_size: int):
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
        if member_digest(member) != digest:
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


def _check_file(data: bytes | None, entry: FileEntry) -> list[str]:
    if data is None:
        return ["is missing"]
    if len(data) != entry.bytes:
        return [f"has {len(data)} bytes, the manifest says {entry.bytes}"]
    return ["does not match its digest"] * (xxhash.xxh3_128_hexdigest(data) != entry.digest)


def _check_tokenizer(folder: Path, manifest: Manifest) -> Finding:
    """Whether the tokenizer in the set, loaded as training loads it, is the one that the manifest names."""
    from quincunx.data_shards.tokenizer import load_tokenizer, special_ids, tokenizer_digest

    tokenizer = load_tokenizer(str(folder))
    problems = []
    if tokenizer_digest(tokenizer) != manifest.tokenizer_digest:
        problems.append("loads with another digest than the manifest's")
    if special_ids(tokenizer) != manifest.special_ids or len(tokenizer) != manifest.vocab_size:
        problems.append("has other special ids or another vocabulary size than the manifest")
    return Finding(f"{TOKENIZER_FOLDER} (as loaded)", 0, 0, 0, tuple(problems))


def repair_shards(path: str, report: Report, say: Callable[[str], None] = print) -> None:
    """Rebuilds the damaged files of a local set from its corpus, by the settings recorded in build.json.

    A rebuilt file takes its place only when it is, byte for byte, what the manifest names. Verify again afterwards.

    Raises:
        DataError: no record of the build, a corpus or tokenizer that is gone or has changed, or a rebuilt file that is
            not the one that was lost.
    """
    if isinstance(files := open_files(path, None, 1), RemoteFiles):
        raise DataError(f"{path} is not a local folder: copy the damaged shards again, or repair the set where it lies")
    output = Path(files.root).absolute()
    manifest = report.manifest
    damaged = {finding.name for finding in report.damaged}
    shards = [shard for shard in manifest.shards if shard.name in damaged]
    tokenizer_files = [entry for entry in manifest.tokenizer_files if f"{TOKENIZER_FOLDER}/{entry.name}" in damaged]
    if shards or tokenizer_files:
        _rebuild(files, output, report, shards, tokenizer_files, say)
    if manifest.statistics.name in damaged:
        _recount_statistics(output, manifest)


def _rebuild(
    files: LocalFiles,
    output: Path,
    report: Report,
    shards: list[ShardEntry],
    tokenizer_files: list[FileEntry],
    say: Callable[[str], None],
) -> None:
    """Puts back shards and tokenizer files, made again from the corpus."""
    from quincunx.data_shards.build import (
        build_identity,
        differences,
        identity_of,
        remove_work,
        working_folder,
        write_plan,
    )
    from quincunx.data_shards.build_merge import PUBLISHING_NAME
    from quincunx.data_shards.build_settings import BuildSettings
    from quincunx.data_shards.build_task import run_task
    from quincunx.data_shards.readers import list_inputs

    try:
        record = read_record(files)
    except DataError as error:
        raise DataError(f"{files.root}/{BUILD_NAME} {error}") from None
    if record is None:
        raise DataError(f"{files.root} has no {BUILD_NAME}, so its corpus is not known: copy the damaged files again")
    if not Path(record["folder"]).is_dir():
        raise DataError(
            f"{files.root} cannot be repaired, the folder {record['folder']} that it was built from is gone: bring it "
            f"back, copy the damaged files again, or build anew with `{report.command} --overwrite`"
        )
    try:
        settings = BuildSettings(**record["settings"])
    except TypeError as error:
        raise DataError(
            f"{files.root} cannot be repaired, its {BUILD_NAME} names other settings than this quincunx has ({error}): "
            f"copy the damaged files again, or build anew with `{report.command} --overwrite`"
        ) from None
    with contextlib.chdir(record["folder"]):
        identity = build_identity(settings, list_inputs(settings.format, settings.path))
        if identity != identity_of(report.manifest):
            raise DataError(
                f"{files.root} cannot be repaired, it was built from something else "
                f"({differences(identity_of(report.manifest), identity)}): build anew with "
                f"`{report.command} --overwrite`"
            )
        with working_folder(output, identity, overwrite=False) as work:
            plan = write_plan(settings, identity, work, say)
            for task in sorted({int(shard.name.split("-")[1]) for shard in shards}):
                say(f"running task {task} of the build again")
                run_task(plan, task)
            (work / PUBLISHING_NAME).touch()  # files leave it from here on: no later build may go on from it
            for shard in shards:
                _put_back(plan.shards_folder / shard.name, output / shard.name, shard.digest)
            for entry in tokenizer_files:
                name = f"{TOKENIZER_FOLDER}/{entry.name}"
                _put_back(work / name, output / name, entry.digest)
            remove_work(work)


def _put_back(rebuilt: Path, target: Path, digest: str) -> None:
    """Moves a rebuilt file to its place, if its digest is the one wanted."""
    if not rebuilt.exists() or xxhash.xxh3_128_hexdigest(rebuilt.read_bytes()) != digest:
        raise DataError(
            f"{target} came out differently when it was rebuilt, so another version of quincunx or of a library made "
            "it: copy it again, or build the whole set anew with --overwrite"
        )
    target.parent.mkdir(exist_ok=True)
    os.replace(rebuilt, target)


def _recount_statistics(output: Path, manifest: Manifest) -> None:
    counter = StatisticsCounter(manifest.vocab_size, int(manifest.settings["num_buckets"]))
    for shard in manifest.shards:
        check_shard((output / shard.name).read_bytes(), shard, manifest.vocab_size, counter)
    rebuilt = output / f".{manifest.statistics.name}.tmp"
    rebuilt.write_bytes(counter.to_bytes())
    _put_back(rebuilt, output / manifest.statistics.name, manifest.statistics.digest)
