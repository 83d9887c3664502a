"""Fine-tuning examples: one global batch for every world size, every query once an epoch, true texts, pure draws."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quincunx.data_shards.batches import Text
from quincunx.data_shards.errors import DataError
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


NUM_FEW = 60
FEW_PASSAGES = make_collection([f"p{n}" for n in range(NUM_FEW)], ["text"] * NUM_FEW, "passages")


def drawn_groups(sizes: list[tuple[int, int]], *, with_scores=False, first=0, **options) -> Groups:
    """Query n has sizes[n] = (positives, negatives), some passages of 60; its score of passage p is 100 n + p."""
    candidates = []
    for n, (num_positives, num_negatives) in enumerate(sizes):
        rows = np.random.default_rng(first + n).permutation(NUM_FEW)[: num_positives + num_negatives].tolist()
        ids = [f"p{row}" for row in rows]
        scores = {f"p{row}": 100.0 * (first + n) + row for row in rows} if with_scores else None
        candidates.append(Candidates(f"q{first + n}", tuple(ids[:num_positives]), tuple(ids[num_positives:]), scores))
    queries = make_collection([row.query_id for row in candidates], ["text"] * len(candidates), "queries")
    groups = Groups(candidates, queries, FEW_PASSAGES, with_scores=with_scores, **{"seed": 3, **options})
    groups.candidates = candidates
    return groups


def names(rows: np.ndarray) -> list[str]:
    return [f"p{row}" for row in rows]


SIZES = st.lists(st.tuples(st.integers(1, 4), st.integers(0, 20)), min_size=1, max_size=6)


@settings(deadline=None, max_examples=60)
@given(sizes=SIZES, num_hard_negatives=st.integers(0, 12), seed=st.integers(-5, 2**40), epoch=st.integers(0, 50))
def test_a_group_is_a_positive_then_distinct_negatives_none_of_them_a_positive(sizes, num_hard_negatives, seed, epoch):
    groups = drawn_groups(sizes, num_hard_negatives=num_hard_negatives, seed=seed)
    sample_ids = np.arange(len(sizes))
    rows_BG, scores = groups.draw(np.full(len(sizes), epoch, np.int32), sample_ids)
    assert scores is None and rows_BG.dtype == np.int64 and rows_BG.shape == (len(sizes), 1 + num_hard_negatives)
    for row, group in zip(groups.candidates, rows_BG.tolist(), strict=True):
        positive, *negatives = names(group)
        assert positive in row.positives
        assert not set(negatives) & set(row.positives)
        assert len(set(group)) == len(group)
        mined = set(negatives) & set(row.negatives)
        assert len(mined) == min(num_hard_negatives, len(row.negatives)), "mined ones first, random ones only to fill"
        assert set(negatives[: len(mined)]) == mined
    assert groups.num_filled == sum(num_negatives < num_hard_negatives for _, num_negatives in sizes)


@settings(deadline=None, max_examples=40)
@given(sizes=SIZES, num_hard_negatives=st.integers(1, 12), epoch=st.integers(0, 9), data=st.data())
def test_a_draw_does_not_depend_on_the_other_queries_nor_on_the_place_in_the_list(
    sizes, num_hard_negatives, epoch, data
):
    whole = drawn_groups(sizes, num_hard_negatives=num_hard_negatives)
    expected, _ = whole.draw(np.full(len(sizes), epoch), np.arange(len(sizes)))
    chosen = np.array(data.draw(st.permutations(range(len(sizes)))))
    again, _ = whole.draw(np.full(len(sizes), epoch), chosen)
    np.testing.assert_array_equal(again, expected[chosen])
    from_second = drawn_groups(sizes[1:], num_hard_negatives=num_hard_negatives, first=1) if sizes[1:] else whole
    start = int(bool(sizes[1:]))
    alone, _ = from_second.draw(np.array([epoch]), np.array([len(sizes) - 1 - start]))
    np.testing.assert_array_equal(alone[0], expected[-1])


@settings(deadline=None, max_examples=40)
@given(
    num_positives=st.integers(1, 6), num_negatives=st.integers(5, 20), group=st.integers(2, 6), start=st.integers(0, 99)
)
def test_no_candidate_comes_again_before_all_have_come(num_positives, num_negatives, group, start):
    """So over whole rounds all counts are equal, and each positive comes once in as many epochs as there are."""
    groups = drawn_groups([(num_positives, num_negatives)], num_hard_negatives=group - 1)
    rows_EG, _ = groups.draw(np.arange(0, num_positives * num_negatives), np.zeros(num_positives * num_negatives, int))
    assert set(np.unique(rows_EG[:, 0], return_counts=True)[1]) == {num_negatives}
    assert set(np.unique(rows_EG[:, 1:], return_counts=True)[1]) == {num_positives * (group - 1)}
    rows_EG, _ = groups.draw(np.arange(start, start + num_positives), np.zeros(num_positives, int))
    assert len(set(rows_EG[:, 0])) == num_positives


def test_seeds_queries_and_epochs_draw_differently():
    groups = drawn_groups([(4, 40)] * 20, num_hard_negatives=5)
    zeros, rows = np.zeros(20, int), np.arange(20)
    one = groups.draw(zeros, rows)[0]
    other_epoch = groups.draw(zeros + 1, rows)[0]
    other_seed = drawn_groups([(4, 40)] * 20, num_hard_negatives=5, seed=4).draw(zeros, rows)[0]
    for other in (other_epoch, other_seed):
        assert (one != other).mean() > 0.7
    places = [groups.candidates[n].negatives.index(f"p{one[n, 1]}") for n in range(20)]
    assert len(set(places)) > 8, "the first draw stands at another place of each query's list"


def test_random_filling_is_fresh_each_epoch_and_spreads_over_the_collection():
    groups = drawn_groups([(2, 1)], num_hard_negatives=4)
    rows = groups.draw(np.arange(200), np.zeros(200, int))[0]
    assert (rows[:, 1] == rows[0, 1]).all()
    counts = np.bincount(rows[:, 2:].ravel(), minlength=NUM_FEW)
    assert (counts > 0).sum() == NUM_FEW - 3, "all but the two positives and the one mined negative"


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 20)), min_size=1, max_size=6),
    num_hard_negatives=st.integers(1, 12),
    epoch=st.integers(0, 9),
)
def test_teachers_scores_stand_at_their_candidates_and_short_lists_repeat(sizes, num_hard_negatives, epoch):
    groups = drawn_groups(sizes, num_hard_negatives=num_hard_negatives, with_scores=True)
    rows_BG, scores_BG = groups.draw(np.full(len(sizes), epoch), np.arange(len(sizes)))
    assert scores_BG.dtype == np.float32
    np.testing.assert_array_equal(scores_BG, 100 * np.arange(len(sizes))[:, None] + rows_BG)
    for row, group in zip(groups.candidates, rows_BG, strict=True):
        assert set(names(group[1:])) <= set(row.negatives)
        assert len(set(group[1:])) == min(num_hard_negatives, len(row.negatives))


def test_all_positives_of_a_query_are_known_padded_to_one_width():
    groups = drawn_groups([(2, 5), (1, 5), (3, 5)], num_hard_negatives=2)
    positives_BP = groups.positives(np.array([1, 2]))
    assert positives_BP.shape == (2, 3) and positives_BP.dtype == np.int64
    assert names(positives_BP[0, :1]) == list(groups.candidates[1].positives) and (positives_BP[0, 1:] == -1).all()
    assert names(positives_BP[1]) == list(groups.candidates[2].positives)


def row(query="q0", positives=("p1",), negatives=("p2",), scores=None) -> Candidates:
    return Candidates(query, positives, negatives, scores)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, "no training query"),
        ([row(), row("q9")], {}, r"candidates names 1 queries that queries does not have \(first: q9\)"),
        ([row(negatives=("p2", "x", "y"))], {}, r"names 2 passages that passages does not have \(first: x, y\)"),
        ([row(scores={"p1": 1.0})], {"with_scores": True}, "lacks the teacher's score of 1 candidates"),
        ([row(negatives=(), scores={"p1": 1.0})], {"with_scores": True}, "no negatives for 1 queries"),
        ([row()], {"num_hard_negatives": 60}, "has 60 passages, too few to fill groups of 61"),
    ],
)
def test_candidates_that_cannot_be_trained_on_are_refused(rows, options, message):
    queries = make_collection(["q0"], ["text"], "queries")
    with pytest.raises(DataError, match=message):
        Groups(rows, queries, FEW_PASSAGES, **{"num_hard_negatives": 1, "seed": 0, **options})


def test_a_group_as_large_as_the_collection_is_filled():
    groups = drawn_groups([(1, 3)], num_hard_negatives=NUM_FEW - 1)
    assert sorted(groups.draw(np.array([0]), np.array([0]))[0][0]) == list(range(NUM_FEW))
