"""The stream of fine-tuning batches: one global batch for every world size, every query once an epoch, true texts."""

import random

import numpy as np
import pytest

from quincunx.data_shards.batches import Text
from quincunx.data_shards.tokenizer import tokenise
from quincunx.data_shards.tokenizer_training import train_wordpiece
from quincunx.engine.retrieval import examples as module
from quincunx.engine.retrieval.candidates import Candidates
from quincunx.engine.retrieval.collection import make_collection
from quincunx.engine.retrieval.examples import Groups, RerankerPacker, RetrieverPacker, stream_examples

NUM_QUERIES, NUM_PASSAGES = 50, 120
WORDS = ["".join(random.Random(n).choices("aeioubdgkmnprst", k=3 + n % 5)) for n in range(150)]


def sentence(draw: random.Random, most: int) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(3, most)))


DRAW = random.Random(1)
QUERIES = make_collection([f"q{n}" for n in range(99)], [sentence(DRAW, 9) for _ in range(99)], "queries")
PASSAGES = make_collection(
    [f"p{n}" for n in range(NUM_PASSAGES)], [sentence(DRAW, 40) for _ in range(NUM_PASSAGES)], "passages"
)


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece(iter(PASSAGES.texts() + QUERIES.texts()), 300)


def make_groups(with_scores: bool = False, num_hard_negatives: int = 3) -> Groups:
    draw, candidates = random.Random(2), []
    for n in range(NUM_QUERIES):
        ids = [f"p{row}" for row in draw.sample(range(NUM_PASSAGES), 9)]
        scores = {id: draw.random() for id in ids} if with_scores else None
        positives = 1 + n % 3
        candidates.append(Candidates(f"q{98 - n}", tuple(ids[:positives]), tuple(ids[positives:]), scores))
    return Groups(candidates, QUERIES, PASSAGES, num_hard_negatives=num_hard_negatives, seed=7, with_scores=with_scores)


def make_packer(tokenizer, kind="retriever", with_scores=False, **options):
    groups = make_groups(with_scores)
    if kind == "reranker":
        return RerankerPacker(groups, tokenizer, **{"max_tokens": 48, **options})
    limits, prompts = {"query": 16, "passage": 40}, {"query": "", "passage": ""}
    return RetrieverPacker(groups, tokenizer, **{"max_tokens": limits, "prompts": prompts, **options})


def make_stream(packer, **options):
    return stream_examples(packer, **{"seed": 7, "global_batch": 16, "micro_batch": 2, "num_workers": 0, **options})


def content(batch) -> list:
    """Every field of a batch, as bytes where it is an array."""
    fields = []
    for value in vars(batch).values():
        parts = value if isinstance(value, list) else vars(value).values() if isinstance(value, Text) else [value]
        fields += [np.asarray(part).tobytes() if hasattr(part, "shape") else part for part in parts]
    return fields


def sequences(text: Text) -> list[np.ndarray]:
    return np.split(text.input_ids.numpy(), text.cu_seqlens[1:-1].tolist())


def by_query(batches) -> list[tuple]:
    """Each query of some retriever batches with its texts, in order: what does not depend on the cut into batches."""
    queries = []
    for batch in batches:
        query_texts, passage_texts = sequences(batch.queries), sequences(batch.passages)
        for n in range(len(batch)):
            own = slice(n * batch.group, (n + 1) * batch.group)
            texts = [query_texts[n].tobytes(), *(text.tobytes() for text in passage_texts[own])]
            scores = None if batch.teacher_scores is None else batch.teacher_scores[n].tobytes()
            rows = batch.passage_rows[own].tobytes(), batch.positives[n].tobytes()
            queries.append((int(batch.query_rows[n]), *rows, *texts, scores))
    return queries


@pytest.mark.parametrize("with_scores", [False, True])
def test_the_global_batch_is_the_same_at_every_world_size_and_micro_batch(tokenizer, with_scores):
    packer = make_packer(tokenizer, with_scores=with_scores)

    def global_batch(world_size, micro_batch):
        ranks = [make_stream(packer, rank=r, world_size=world_size, micro_batch=micro_batch) for r in range(world_size)]
        return by_query(batch for rank in ranks for batch in rank.step(5))

    whole = global_batch(1, 16)
    assert len(whole) == 16
    for world_size, micro_batch in [(1, 2), (2, 8), (2, 1), (4, 4), (16, 1)]:
        assert global_batch(world_size, micro_batch) == whole


@pytest.mark.parametrize("global_batch", [2, 16, 64])
def test_every_query_comes_once_an_epoch_and_the_epochs_tail_is_not_lost(tokenizer, global_batch):
    stream = make_stream(make_packer(tokenizer), global_batch=global_batch)
    rows = [stream.order.global_batch(step, global_batch) for step in range(-(-4 * NUM_QUERIES // global_batch))]
    epochs = np.concatenate([part.epochs for part in rows])
    sample_ids = np.concatenate([part.sample_ids for part in rows])
    orders = [sample_ids[epochs == epoch].tolist() for epoch in range(4)]
    for order in orders:
        assert sorted(order) == list(range(NUM_QUERIES))
    assert orders[0] != orders[1] and orders[0] != sorted(orders[0])
    received = [row for step in range(len(rows)) for batch in stream.step(step) for row in batch.query_rows]
    assert received == [98 - n for n in sample_ids]


@pytest.mark.parametrize("kind", ["retriever", "reranker"])
def test_workers_and_restarts_do_not_change_a_batch(tokenizer, kind):
    pure = make_stream(make_packer(tokenizer, kind))
    expected = [[content(batch) for batch in pure.step(step)] for step in range(12)]
    for num_workers, start in [(0, 0), (1, 0), (3, 0), (2, 7)]:
        steps = make_stream(make_packer(tokenizer, kind), num_workers=num_workers).iterate(start)
        got = [[content(batch) for batch in next(steps)] for _ in range(start, 12)]
        steps.close()
        assert got == expected[start:]


def test_a_retriever_batch_holds_the_texts_of_its_rows_cut_and_counted(tokenizer):
    prompts = {"query": "aeio: ", "passage": "ubdg: "}
    packer = make_packer(tokenizer, max_tokens={"query": 12, "passage": 30}, prompts=prompts)
    cut = []
    for batch in make_stream(packer).step(3):
        assert len(batch) == 2 and batch.num_passages == 8
        assert batch.num_tokens == len(batch.queries.input_ids) + len(batch.passages.input_ids)
        num_cut = 0
        for text, rows, collection, prompt, most in [
            (batch.queries, batch.query_rows, QUERIES, "aeio: ", 12),
            (batch.passages, batch.passage_rows, PASSAGES, "ubdg: ", 30),
        ]:
            whole = tokenizer([prompt + collection.text_at(row) for row in rows])["input_ids"]
            num_cut += sum(len(ids) > most for ids in whole)
            expected = [ids if len(ids) <= most else [*ids[: most - 1], ids[-1]] for ids in whole]
            assert [ids.tolist() for ids in sequences(text)] == expected
        assert batch.num_cut_texts == num_cut
        cut.append(num_cut)
    assert 0 < sum(cut) < 8 * 10, "some are cut and some are not"


def test_rows_are_groups_of_a_positive_and_negatives_with_all_positives_known(tokenizer):
    batches = [batch for step in range(7) for batch in make_stream(make_packer(tokenizer)).step(step)]
    for batch in batches:
        groups = batch.passage_rows.reshape(len(batch), batch.group)
        for group, known in zip(groups, batch.positives, strict=True):
            assert group[0] in known and not set(group[1:]) & set(known)
    assert {batch.positives.shape for batch in batches} == {(2, 3)}, "one width, so that ranks can gather"


def test_a_reranker_batch_holds_each_query_with_each_of_its_passages(tokenizer):
    cut = 0
    for batch in make_stream(make_packer(tokenizer, "reranker")).step(2):
        queries = [QUERIES.text_at(row) for row in np.repeat(batch.query_rows, batch.group)]
        passages = PASSAGES.texts(batch.passage_rows)
        expected = tokenizer(queries, passages, truncation="longest_first", max_length=48)
        assert [ids.tolist() for ids in batch.pairs] == expected["input_ids"]
        assert [kinds.tolist() for kinds in batch.token_types] == expected["token_type_ids"]
        cut += batch.num_cut_texts
        assert batch.num_cut_texts == sum(len(ids) > 48 for ids in tokenizer(queries, passages)["input_ids"])
        assert (len(batch), batch.num_passages) == (2, 8)
        assert batch.num_tokens == sum(map(len, batch.token_types))
    assert cut > 0


def test_a_full_cache_changes_no_batch(tokenizer, monkeypatch):
    expected = [content(batch) for batch in make_stream(make_packer(tokenizer)).step(1)]
    packer = make_packer(tokenizer)
    stream = make_stream(packer)
    stream.step(0)
    assert [content(batch) for batch in stream.step(1)] == expected
    monkeypatch.setattr(module, "CACHED_TEXTS", 5)
    packer = make_packer(tokenizer)
    stream = make_stream(packer)
    stream.step(0)
    assert [content(batch) for batch in stream.step(1)] == expected
    assert len(packer._passages._kept) == 5


@pytest.mark.parametrize("kind", ["retriever", "reranker"])
def test_the_runs_tokenizer_is_left_as_it_is(tokenizer, kind):
    """An evaluation may cut or pad with it while the workers run; neither may reach the other."""
    expected = [content(batch) for batch in make_stream(make_packer(tokenizer, kind)).step(0)]
    backend = tokenizer.backend_tokenizer
    backend.enable_truncation(5)
    backend.enable_padding()
    try:
        assert [content(batch) for batch in make_stream(make_packer(tokenizer, kind)).step(0)] == expected
        assert backend.truncation["max_length"] == 5 and backend.padding is not None
    finally:
        backend.no_truncation()
        backend.no_padding()


def test_texts_are_tokenised_as_for_encoding(tokenizer):
    batch = make_stream(make_packer(tokenizer)).step(0)[0]
    expected = tokenise(PASSAGES.texts(batch.passage_rows), tokenizer, 40)
    np.testing.assert_array_equal(batch.passages.input_ids, np.concatenate(expected))
