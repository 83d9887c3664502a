"""Packed batches of real shards: right texts and labels, exact complements, and nothing that depends on the packing."""

from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quincunx.data_shards.batches import Batch, batches_by_length, join_texts
from quincunx.data_shards.errors import SettingsError
from quincunx.data_shards.hashing import ALWAYS
from quincunx.data_shards.packer import Packer
from quincunx.data_shards.shard_writer import Sample
from quincunx.data_shards.shards import Text, open_shards
from quincunx.data_shards.stream import Rows
from quincunx.data_shards.tasks import TASKS, TaskSpec, shares_served

CLS, SEP, MASK, VOCAB_SIZE = 101, 102, 103, 30522


def make_packer(shard_sets, decoder="enhanced", tasks=tuple(TASKS), **changes) -> Packer:
    options = {
        "encoder_mask_rate": 0.3,
        "decoder_mask_rate": 0.5,
        "corruption": "80-10-10",
        "neighbour": "next",
        "max_tokens": 144,
        "seed": 7,
    }
    specs = [TaskSpec(name=name, decoder=decoder) for name in tasks]
    return Packer(shard_sets, specs, **(options | changes))


def pack(packer: Packer, sample_ids, epoch: int = 0, dataset: int = 0) -> SimpleNamespace:
    size = len(sample_ids)
    rows = Rows(np.full(size, dataset, np.int16), np.full(size, epoch, np.int32), np.array(sample_ids, np.int64))
    return as_arrays(packer.pack(rows))


def as_arrays(batch: Batch) -> SimpleNamespace:
    """A batch as numpy arrays, each task with its text."""

    def text_of(text) -> SimpleNamespace:
        return SimpleNamespace(input_ids=text.input_ids.numpy(), cu_seqlens=text.cu_seqlens.numpy())

    def columns_of(labels) -> dict[str, np.ndarray]:
        return {"label_positions": labels.positions.numpy(), "labels": labels.ids.numpy()}

    tasks = {}
    for name, task in batch.tasks.items():
        context = batch.contexts[task.context]
        rule = {key: getattr(task, key) for key in ("keys", "word_ids", "keep_thresholds")}
        tasks[name] = SimpleNamespace(
            text=text_of(context.text),
            passage_index=context.passage_index.numpy(),
            **columns_of(task.labels),
            **{key: value if value is None else value.numpy() for key, value in rule.items()},
        )
    encoder = {f"encoder_{key}": value for key, value in columns_of(batch.encoder_labels).items()}
    return SimpleNamespace(encoder=text_of(batch.encoder), tasks=tasks, num_cut_texts=batch.num_cut_texts, **encoder)


def sequences(text) -> list[np.ndarray]:
    return np.split(text.input_ids, text.cu_seqlens[1:-1]) if len(text.cu_seqlens) > 1 else []


def original(text, positions, labels) -> np.ndarray:
    """input_ids with the labels written back."""
    restored = text.input_ids.copy()
    restored[positions] = labels
    return restored


def stored(shard_set, sample_id: int, field: str) -> np.ndarray:
    """The text of a sample as its block holds it, empty where it is missing."""
    starts = np.cumsum([0, *shard_set.block_samples("train")])
    number = int(np.searchsorted(starts, sample_id, side="right")) - 1
    block, index = shard_set.read_block("train", number), sample_id - starts[number]
    if field == "next":
        return block.text("passage", index + 1).token_ids if block.has_next[index] else np.empty(0, int)
    return block.text(field, index).token_ids


@pytest.mark.parametrize("decoder", ["masked", "enhanced"])
def test_every_text_stands_between_cls_and_sep_and_a_missing_field_gives_no_row(shard_set, decoder):
    sample_ids = np.arange(0, 300, 2)
    batch = pack(make_packer([shard_set], decoder), sample_ids)
    restored = original(batch.encoder, batch.encoder_label_positions, batch.encoder_labels)
    for sample_id, ids in zip(sample_ids, np.split(restored, batch.encoder.cu_seqlens[1:-1])):
        assert np.array_equal(ids, [CLS, *stored(shard_set, sample_id, "passage"), SEP])
    assert list(batch.tasks) == list(TASKS)
    for name, task in batch.tasks.items():
        texts = [stored(shard_set, sample_id, TASKS[name].field) for sample_id in sample_ids]
        present = [row for row, ids in enumerate(texts) if len(ids)]
        assert task.passage_index.tolist() == present
        assert len(present) > 0 and (len(present) < len(texts)) == (TASKS[name].field != "passage")
        restored = original(task.text, task.label_positions, task.labels)
        for row, ids in zip(present, np.split(restored, task.text.cu_seqlens[1:-1])):
            assert np.array_equal(ids, [CLS, *texts[row], SEP])


@pytest.mark.parametrize("decoder", ["masked", "enhanced"])
def test_cmp_hides_exactly_what_the_encoder_saw(shard_set, decoder):
    batch = pack(make_packer([shard_set], decoder), np.arange(200))
    task, special = batch.tasks["cmp"], np.isin(batch.tasks["mkp"].text.input_ids, [CLS, SEP])
    hidden_from_encoder = np.zeros(len(batch.encoder.input_ids), bool)
    hidden_from_encoder[batch.encoder_label_positions] = True
    if decoder == "masked":
        hidden_from_decoder = np.zeros_like(hidden_from_encoder)
        hidden_from_decoder[task.label_positions] = True
    else:
        hidden_from_decoder = task.keep_thresholds == 0
        assert (task.keep_thresholds[~hidden_from_decoder] == ALWAYS).all()
    at_the_ends = np.isin(np.arange(len(special)), [batch.encoder.cu_seqlens[:-1], batch.encoder.cu_seqlens[1:] - 1])
    assert np.array_equal(hidden_from_decoder, ~hidden_from_encoder & ~at_the_ends)


def test_masked_texts_hide_a_budget_of_the_decoders_rate(shard_set):
    for name, task in pack(make_packer([shard_set], "masked"), np.arange(300)).tasks.items():
        ends, num_short = task.text.cu_seqlens, 0
        restored = original(task.text, task.label_positions, task.labels)
        for start, end in pairwise(ends):
            num_ordinary = np.count_nonzero(~np.isin(restored[start:end], [CLS, SEP]))
            num_hidden = np.count_nonzero((task.label_positions >= start) & (task.label_positions < end))
            budget = max(1, int(0.5 * num_ordinary + 0.5))
            assert name == "cmp" or num_hidden <= budget
            num_short += num_hidden < budget
        assert num_short < 0.2 * len(ends)  # where no word left over fits; words have 1 to a few tokens here
        assert not (np.delete(task.text.input_ids, task.label_positions) == MASK).any()


def test_the_mask_setting_writes_only_mask_in_the_encoders_and_the_decoders_texts(shard_set):
    batch = pack(make_packer([shard_set], "masked", corruption="mask"), np.arange(50))
    assert (batch.encoder.input_ids[batch.encoder_label_positions] == MASK).all()
    for task in batch.tasks.values():
        assert (task.text.input_ids[task.label_positions] == MASK).all()


def test_enhanced_texts_are_whole_and_every_ordinary_token_is_labelled(shard_set):
    for task in pack(make_packer([shard_set]), np.arange(200)).tasks.values():
        ordinary = ~np.isin(task.text.input_ids, [CLS, SEP])
        assert np.array_equal(task.label_positions, np.flatnonzero(ordinary))
        assert np.array_equal(task.labels, task.text.input_ids[ordinary])
        assert (task.keep_thresholds[~ordinary] == ALWAYS).all()


def test_a_uniform_threshold_is_one_minus_the_rate(shard_set):
    batch = pack(make_packer([shard_set], decoder_mask_rate=0.3), np.arange(100))
    for name in ("dor", "gor", "retromae"):
        task = batch.tasks[name]
        assert (task.keep_thresholds[task.label_positions] == round(0.7 * ALWAYS)).all()


def parts_of(batch, row: int) -> dict[str, list]:
    """Everything the batch says about one of its passages."""
    parts = {"encoder": [sequences(batch.encoder)[row].tolist()]}
    labels = np.zeros(len(batch.encoder.input_ids), int)
    labels[batch.encoder_label_positions] = batch.encoder_labels
    parts["encoder"].append(np.split(labels, batch.encoder.cu_seqlens[1:-1])[row].tolist())
    for name, task in batch.tasks.items():
        for s in np.flatnonzero(task.passage_index == row):
            start, end = task.text.cu_seqlens[s : s + 2]
            mine = (task.label_positions >= start) & (task.label_positions < end)
            parts[name] = [task.text.input_ids[start:end].tolist(), (task.label_positions[mine] - start).tolist()]
            parts[name].append(task.labels[mine].tolist())
            if task.keys is not None:
                parts[name] += [task.keys[s], task.word_ids[start:end].tolist()]
                parts[name].append(task.keep_thresholds[start:end].tolist())
    return parts


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_a_passage_has_the_same_masks_in_whatever_batch_it_is_packed(shard_set, data):
    packer = make_packer([shard_set], data.draw(st.sampled_from(["masked", "enhanced"])))
    rows = data.draw(st.lists(st.integers(0, 300), min_size=1, max_size=12))
    together = pack(packer, rows)
    for row, sample_id in enumerate(rows):
        assert parts_of(together, row) == parts_of(pack(packer, [sample_id]), 0)


def test_epochs_seeds_and_datasets_draw_other_masks(shard_set):
    def draw(seed: int, epoch: int, dataset: int) -> tuple[list[int], list[int]]:
        """What the encoder's text hides, and what the rows of an enhanced decoder see."""
        batch = pack(make_packer([shard_set, shard_set], seed=seed), np.arange(50), epoch, dataset)
        return batch.encoder_label_positions.tolist(), batch.tasks["mkp"].keys.tolist()

    draws = [draw(seed, epoch, dataset) for seed in (1, 2) for epoch in (0, 1) for dataset in (0, 1)]
    for part in zip(*draws):
        assert all(first != second for i, first in enumerate(part) for second in part[:i])
    assert len(set(draws[0][1])) == 50 and draw(1, 0, 0) == draws[0]


def test_rows_of_a_mixture_come_from_their_datasets(shard_set, other_shard_set):
    packer = make_packer([shard_set, other_shard_set])
    datasets, sample_ids = np.array([0, 1, 1, 0], np.int16), np.array([5, 5, 60, 200])
    batch = as_arrays(packer.pack(Rows(datasets, np.zeros(4, np.int32), sample_ids)))
    restored = original(batch.encoder, batch.encoder_label_positions, batch.encoder_labels)
    for dataset, sample_id, ids in zip(datasets, sample_ids, np.split(restored, batch.encoder.cu_seqlens[1:-1])):
        source = [shard_set, other_shard_set][dataset]
        assert np.array_equal(ids[1:-1], stored(source, sample_id, "passage"))


def test_halves_give_the_encoder_the_first_half_and_npr_the_second(shard_set):
    packer = make_packer([shard_set], tasks=("npr", "mkp"), neighbour="halves")
    sample_ids = np.arange(300)
    batch = pack(packer, sample_ids)
    restored = original(batch.encoder, batch.encoder_label_positions, batch.encoder_labels)
    first = np.split(restored, batch.encoder.cu_seqlens[1:-1])
    second = dict(zip(batch.tasks["npr"].passage_index, sequences(batch.tasks["npr"].text)))
    decoded = dict(zip(batch.tasks["mkp"].passage_index, sequences(batch.tasks["mkp"].text)))
    num_even = 0
    for row, sample_id in enumerate(sample_ids):
        whole = stored(shard_set, sample_id, "passage")
        tail = second[row][1:-1] if row in second else []
        assert np.array_equal([*first[row][1:-1], *tail], whole)
        assert np.array_equal(decoded[row], first[row])
        num_even += abs(len(tail) - len(whole) / 2) <= 2
    assert num_even > 0.6 * len(sample_ids)


def test_texts_beyond_max_tokens_are_cut_before_a_word_and_counted(shard_set):
    whole, cut = (
        pack(make_packer([shard_set]), np.arange(200)),
        pack(make_packer([shard_set], max_tokens=24), np.arange(200)),
    )
    assert whole.num_cut_texts == 0
    num_cut = 0
    pairs = [(whole.tasks[name].text, cut.tasks[name].text) for name in ("mkp", "npr", "dor", "gor")]
    for long, short in pairs:
        for long_ids, short_ids in zip(sequences(long), sequences(short)):
            assert len(short_ids) <= 24
            assert np.array_equal(short_ids[:-1], long_ids[: len(short_ids) - 1])
            num_cut += len(short_ids) < len(long_ids)
    assert cut.num_cut_texts == num_cut > 0
    boundaries = np.diff(whole.tasks["mkp"].word_ids) != 0
    for s, short_ids in enumerate(sequences(cut.tasks["mkp"].text)):
        last = whole.tasks["mkp"].text.cu_seqlens[s] + len(short_ids) - 2
        assert boundaries[last] or whole.tasks["mkp"].word_ids[last + 1] == 0


def test_with_halves_a_cut_passage_is_counted_once_and_the_next_one_not(shard_set):
    sample_ids = np.arange(200)
    batch = pack(make_packer([shard_set], tasks=("npr", "mkp"), neighbour="halves", max_tokens=24), sample_ids)
    assert batch.num_cut_texts == sum(len(stored(shard_set, sample_id, "passage")) > 22 for sample_id in sample_ids) > 0


def test_a_word_longer_than_the_sequence_and_one_token_passages_are_packed(write_shard_set, tmp_path, tokenizer_folder):
    def text(num_tokens: int, first: int) -> Text:
        return Text(np.arange(first, first + num_tokens), np.arange(num_tokens) == 0)

    samples = [Sample("long", text(50, 2000)), Sample("one", text(1, 3000)), Sample("two", text(2, 4000))]
    write_shard_set(tmp_path, tokenizer_folder, [samples], num_buckets=1024)
    for decoder in ("masked", "enhanced"):
        batch = pack(make_packer([open_shards(str(tmp_path))], decoder, max_tokens=12), [0, 1, 2])
        assert np.diff(batch.encoder.cu_seqlens).tolist() == [12, 3, 4]
        assert batch.tasks["npr"].passage_index.tolist() == [0, 1]
        # the budgets are 3, 1 and 1 tokens: only the one-token word fits
        assert batch.encoder_labels.tolist() == [3000]
        assert batch.num_cut_texts == 1
        assert batch.tasks["dor"].text.cu_seqlens.tolist() == [0]
        assert len(batch.tasks["dor"].labels) == 0


def test_a_vocabulary_beyond_16_bits_is_packed(write_shard_set, tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    special = {
        "cls_token": "<s>",
        "sep_token": "</s>",
        "mask_token": "<mask>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
    }
    words = [*special.values(), *(f"w{i}" for i in range(70_000))]
    wide = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=wide, **special).save_pretrained(tmp_path / "tokenizer")
    ids = np.array([70_004, 65_536, 65_535, 4, 69_000, 66_000])
    write_shard_set(tmp_path / "set", str(tmp_path / "tokenizer"), [[Sample("a", Text(ids, np.ones(6, bool)))]])
    for decoder in ("masked", "enhanced"):
        batch = pack(make_packer([open_shards(str(tmp_path / "set"))], decoder, corruption="mask"), [0])
        for text, positions, labels in [
            (batch.encoder, batch.encoder_label_positions, batch.encoder_labels),
            (batch.tasks["mkp"].text, batch.tasks["mkp"].label_positions, batch.tasks["mkp"].labels),
        ]:
            assert original(text, positions, labels).tolist() == [0, *ids, 1]
        # <unk> (4) stands for a word: it may be hidden as any other
        assert len(batch.tasks["mkp"].labels) == (3 if decoder == "masked" else 6)


def test_the_same_text_is_packed_from_blocks_of_any_size(write_shard_set, tmp_path, tokenizer_folder, shard_set):
    texts = [
        Text(stored(shard_set, i, "passage"), np.ones(len(stored(shard_set, i, "passage")), bool)) for i in range(40)
    ]
    batches = []
    for block_samples in (1, 7, 1024):
        folder = tmp_path / str(block_samples)
        documents = [[Sample(str(i), text)] for i, text in enumerate(texts)]
        write_shard_set(folder, tokenizer_folder, documents, block_samples=block_samples, num_buckets=1024)
        batches.append(pack(make_packer([open_shards(str(folder))]), np.arange(40)))
    for other in batches[1:]:
        for row in range(40):
            assert parts_of(other, row) == parts_of(batches[0], row)


def test_shard_sets_of_two_tokenizers_are_refused(shard_set, other_shard_set, monkeypatch):
    foreign = replace(other_shard_set.manifest, tokenizer_digest="0" * 32)
    monkeypatch.setattr(other_shard_set, "manifest", foreign)
    with pytest.raises(SettingsError, match="different tokenizers"):
        make_packer([shard_set, other_shard_set])


def test_a_tasks_share_is_that_of_the_passages_with_its_text_and_none_is_refused(shard_set):
    counts = shard_set.manifest.fields["train"]
    shares = shares_served([counts], [1], list(TASKS), "next")
    assert shares == [counts[kind.field] / counts["passage"] for kind in TASKS.values()] and 0 < shares[2] < 1
    bare = counts | {"queries": 0, "next": 0}
    with pytest.raises(SettingsError, match=r"'queries'.*generate.py --task queries") as raised:
        shares_served([bare], [1], ["mkp", "npr", "dor"], "next")
    assert "'next'" in str(raised.value)
    assert shares_served([bare], [1], ["mkp", "npr"], "halves") == [1, 1]
    assert shares_served([bare, counts], [1, 3], ["npr"], "next") == [pytest.approx(shares[2] * 3 / 4)]
    twice = {field: 2 * count for field, count in bare.items()}
    assert shares_served([twice, counts], [1, 1], ["npr"], "next") == [pytest.approx(shares[2] / 2)]


def test_batches_hold_every_text_once_within_the_budget_longest_first():
    lengths = [5, 90, 17, 17, 40, 8, 64, 33]
    batches = batches_by_length([np.zeros(length, np.int32) for length in lengths], batch_tokens=80)
    order = [index for batch in batches for index in batch]
    assert sorted(order) == list(range(len(lengths)))
    assert [lengths[index] for index in order] == sorted(lengths, reverse=True)
    assert all(len(batch) == 1 or sum(lengths[index] for index in batch) <= 80 for batch in batches)
    assert batches_by_length([]) == []


def test_packed_texts_lie_end_to_end():
    text = join_texts([np.array([1, 2, 3], np.int32), np.array([4], np.int32)])
    assert text.input_ids.tolist() == [1, 2, 3, 4] and text.cu_seqlens.tolist() == [0, 3, 4]


def test_enhanced_tasks_of_one_field_share_their_context(shard_set):
    rows = Rows(np.zeros(20, np.int16), np.zeros(20, np.int32), np.arange(20))
    enhanced = make_packer([shard_set]).pack(rows)
    assert [enhanced.tasks[name].context for name in ("mkp", "cmp", "npr", "retromae")] == [
        "passage", "passage", "next", "passage",
    ]  # fmt: skip
    masked = make_packer([shard_set], "masked").pack(rows)
    assert list(masked.contexts) == list(masked.tasks) == list(TASKS)
