"""A field of one's own: two lines in a module beside ours, and it is built, stored, verified and decoded."""

import importlib.util
import json

import numpy as np
import pytest

from quincunx.data_shards.build import build_shards
from quincunx.data_shards.build_settings import BuildSettings
from quincunx.data_shards.errors import SettingsError
from quincunx.data_shards.packer import Packer
from quincunx.data_shards.shards import FIELDS, open_shards
from quincunx.data_shards.stream import Rows
from quincunx.data_shards.tasks import GENERATED, TASKS, TaskSpec, shares_served
from quincunx.data_shards.tokenizer import load_tokenizer
from quincunx.data_shards.verify import verify_shards

MODULE = """
from quincunx.data_shards.tasks import GENERATED, TASKS, TaskKind
GENERATED["summary"] = str
TASKS["sdr"] = TaskKind(code=8, field="summary", draw="uniform", title="summary decoding")
"""


@pytest.fixture
def summaries(tmp_path):
    (tmp_path / "summaries.py").write_text(MODULE)
    spec = importlib.util.spec_from_file_location("summaries", tmp_path / "summaries.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    yield
    del GENERATED["summary"], TASKS["sdr"]


@pytest.fixture
def built(summaries, tmp_path, tokenizer_folder):
    """30 documents; every second one has a summary."""
    documents = [{"doc_id": f"d{i}", "paragraphs": [f"This is the text number {i}."]} for i in range(30)]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    records = [{"passage_id": f"d{i}#0", "summary": f"Summary {i}"} for i in range(0, 30, 2)]
    (tmp_path / "summaries.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    settings = BuildSettings(
        format="documents", path=str(tmp_path / "docs.jsonl"), output=str(tmp_path / "set"), tokenizer=tokenizer_folder,
        generations=[str(tmp_path / "summaries.jsonl")], held_out_share=0, workers=1, num_buckets=64, progress=False,
    )  # fmt: skip
    build_shards(settings, [], say=lambda text: None)
    return open_shards(settings.output)


def test_a_new_field_is_stored_by_name_and_decoded_beside_sets_that_lack_it(built, shard_set):
    block = built.read_block("train", 0)
    assert block.fields == (*FIELDS, "summary") and not len(block.text("keywords", 0).token_ids)
    assert built.manifest.fields["train"] == {"passage": 30, "next": 0, "queries": 0, "continuation": 0, "summary": 15}
    verify_shards(built.path)
    packer = Packer(
        [built, shard_set],
        [TaskSpec(name="sdr", decoder="enhanced"), TaskSpec(name="mkp", decoder="enhanced")],
        encoder_mask_rate=0.3,
        decoder_mask_rate=0.5,
        corruption="80-10-10",
        neighbour="next",
        max_tokens=64,
        seed=0,
    )
    sample_ids = np.array([0, 1, 2, 0, 1])
    batch = packer.pack(Rows(np.array([0, 0, 0, 1, 1], np.int16), np.zeros(5, np.int32), sample_ids))
    context = batch.contexts["summary"]
    ids = [built.passage_ids("train", 0)[i] for i in range(3)]
    expected = [row for row, passage_id in enumerate(ids) if int(passage_id[1:].split("#")[0]) % 2 == 0]
    assert context.passage_index.tolist() == expected
    texts = load_tokenizer(built.tokenizer_folder).decode(context.text.input_ids)
    assert texts == " ".join(f"[CLS] summary {ids[row][1:].split('#')[0]} [SEP]" for row in expected)


def test_sets_without_the_new_field_keep_their_bytes_and_are_named_if_a_task_needs_it(
    summaries, shard_set, make_shard_set
):
    assert make_shard_set(1, 150).manifest.dataset_id == shard_set.manifest.dataset_id
    with pytest.raises(SettingsError, match=r"sdr \(summary decoding\), .*'summary': run .*--task summary"):
        shares_served([shard_set.manifest.fields["train"]], [1], ["sdr"], "next")
