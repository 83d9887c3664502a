"""The manifest: what it says, what it refuses, and the id it gives a data set."""

import json
from dataclasses import replace

import pytest

from quincunx.data_shards.errors import DataError
from quincunx.data_shards.shard_writer import manifest_text
from quincunx.data_shards.shards import SCHEMA_VERSION, BlockEntry, FileEntry, Manifest, ShardEntry

MANIFEST = Manifest(
    tokenizer_digest="ab" * 16,
    tokenizer_files=(FileEntry("tokenizer.json", 10, "cd" * 16),),
    vocab_size=300,
    special_ids={"cls": 1, "sep": 2, "mask": 3, "pad": 0, "unk": None, "all": [0, 1, 2, 3]},
    max_tokens=144,
    fields={"train": {"passage": 3, "next": 1, "queries": 0, "continuation": 0}, "heldout": {"passage": 0}},
    shards=(
        ShardEntry(
            "train-00000-000.tar", "train", 10240, 3, "ef" * 16, (BlockEntry(512, 99, 3, "01" * 8, 1536, 5, "02" * 8),)
        ),
    ),
    statistics=FileEntry("statistics.npz", 20, "34" * 16),
    sources=(FileEntry("köln.jsonl", 30, "56" * 16),),
    settings={"tasks": 1, "held_out_share": 0.01},
    counts={"documents": 2},
)


TEXT = manifest_text(MANIFEST)


def test_reading_gives_back_what_was_written_and_the_dataset_id_follows_every_part_of_it():
    assert Manifest.from_json(TEXT, "m") == MANIFEST
    block = replace(MANIFEST.shards[0].blocks[0], digest="ff" * 8)
    others = [
        replace(MANIFEST, max_tokens=145),
        replace(MANIFEST, tokenizer_digest="00" * 16),
        replace(MANIFEST, sources=()),
        replace(MANIFEST, shards=(replace(MANIFEST.shards[0], blocks=(block,)),)),
    ]
    assert len({manifest.dataset_id for manifest in [MANIFEST, *others]}) == 1 + len(others)


def without_a_digest() -> str:
    content = json.loads(TEXT)
    del content["shards"][0]["digest"]
    return json.dumps(content)


@pytest.mark.parametrize(
    ("text", "refusal"),
    [
        ("", "m is damaged"),
        (TEXT[:200], "m is damaged"),
        (without_a_digest(), "m is damaged"),
        ("[]", "m is not a quincunx manifest"),
        ('{"format": "other"}', "m is not a quincunx manifest"),
        (TEXT.replace('"max_tokens": 144', '"max_tokens": 512'), "m does not match its own dataset id"),
        (
            json.dumps({"format": "quincunx-shards", "schema_version": SCHEMA_VERSION + 1, "new": 1}),
            f"schema version {SCHEMA_VERSION + 1}, this quincunx reads up to .* update",
        ),
    ],
)
def test_a_manifest_that_is_foreign_cut_edited_or_newer_is_refused(text, refusal):
    with pytest.raises(DataError, match=refusal):
        Manifest.from_json(text, "m")
