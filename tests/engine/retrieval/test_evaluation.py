"""Measures equal ir-measures' own command line; intervals cover, tests agree with scipy's."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from quincunx.data_shards.errors import DataError, SettingsError
from quincunx.engine.retrieval.evaluation import (
    Evaluation,
    compare,
    evaluate,
    find_measure,
    interval,
    paired_t_test,
    randomisation_test,
)
from quincunx.engine.retrieval.trec import read_qrels, read_run, write_run

MEASURES = [
    "RR@10", "nDCG@10", "AP", "R@50", "R@100", "R@1000", "P@10", "Success@20", "RR", "nDCG", "RR(rel=2)@10",
    "AP(rel=2)", "R(rel=2)@100", "P(rel=2)@5",
]  # fmt: skip


def made_up(generator: np.random.Generator, num_queries: int = 60, depth: int = 300):
    """Graded qrels and a run with ties, queries missing on either side, and one without positives."""
    qrels, run = {}, {}
    for q in range(num_queries):
        judged = generator.choice(2000, 40, replace=False)
        grades = generator.choice([0, 0, 1, 2, 3, -1], 40)
        if q == 5:
            grades = np.zeros(40, int)
        qrels[f"q{q}"] = {f"p{id}": int(grade) for id, grade in zip(judged, grades)}
        if q % 10 == 9:
            continue
        found = generator.permutation(np.concatenate([judged, generator.choice(2000, depth)]))
        run[f"q{q}"] = {f"p{id}": float(generator.integers(0, 80)) / 7 for id in dict.fromkeys(found.tolist())}
    run["unjudged"] = {"p1": 1.0}
    return qrels, run


def command_line(folder: Path, *arguments: str) -> list[dict]:
    """What ir-measures' own command prints, in full precision."""
    command = [str(Path(sys.executable).with_name("ir_measures")), "--output_format", "jsonl", "qrels", "run"]
    done = subprocess.run([*command, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_value_equals_ir_measures_command_line(tmp_path):
    qrels, run = made_up(np.random.default_rng(1))
    lines = (f"{query} 0 {id} {grade}\n" for query, grades in qrels.items() for id, grade in grades.items())
    (tmp_path / "qrels").write_text("".join(lines))
    write_run(tmp_path / "run", ((query, found, list(found.values())) for query, found in run.items()), "made")
    found = evaluate(read_run(tmp_path / "run"), read_qrels(tmp_path / "qrels"), MEASURES)
    assert found == evaluate(run, qrels, MEASURES), "the order of a file's lines matters"
    printed = command_line(tmp_path, "--by_query", *MEASURES)
    # 1e-12: the same values, summed in another order for the means.
    for line in printed:
        values = found.means if line["query_id"] == "all" else found.per_query[line["measure"]]
        key = line["measure"] if line["query_id"] == "all" else line["query_id"]
        assert values[key] == pytest.approx(line["value"], abs=1e-12), line
    assert len(printed) == len(MEASURES) * (len(qrels) + 1)
    assert len({round(mean, 6) for mean in found.means.values()}) > 10, "the measures must differ to be told apart"


def test_a_judged_query_that_the_run_misses_counts_zero_and_an_unjudged_one_not():
    qrels = {"a": {"p": 1}, "b": {"p": 1}}
    found = evaluate({"a": {"p": 1.0}, "z": {"p": 1.0}}, qrels, ["MRR@10", "nDCG@10", "MAP", "R@50"])
    assert set(found.means.values()) == {0.5}
    assert all(values == {"a": 1.0, "b": 0.0} for values in found.per_query.values())


def test_names_of_the_field_are_those_of_ir_measures():
    names = ["MRR@10", "MAP", "Recall@100", "NDCG@10", "RR@10", "R(rel=3)@5", "Success@20"]
    plain = ["RR@10", "AP", "R@100", "nDCG@10", "RR@10", "R(rel=3)@5", "Success@20"]
    assert [str(find_measure(name)) for name in names] == plain
    graded = ["RR(rel=2)@10", "AP(rel=2)", "R(rel=2)@100", "nDCG@10", "RR(rel=2)@10", "R(rel=3)@5", "Success(rel=2)@20"]
    assert [str(find_measure(name, 2)) for name in names] == graded
    for bad in ("MRR@", "nDGC@10", "", "alpha_nDCG@10", "RR@x", "NumRet", "NumQ", "NumRelRet"):
        with pytest.raises(SettingsError, match="cannot be computed"):
            find_measure(bad)


def test_a_grade_below_relevant_from_is_not_relevant_but_gains():
    qrels, run = {"q": {"a": 1, "b": 3}}, {"q": {"a": 2.0, "b": 1.0}}
    found = evaluate(run, qrels, ["MRR@10", "MAP", "R@1", "nDCG@10"], relevant_from=2).means
    # nDCG: (1/log2(2) + 3/log2(3)) / (3/log2(2) + 1/log2(3)) with trec_eval's linear gains
    assert found == pytest.approx(
        {"RR(rel=2)@10": 0.5, "AP(rel=2)": 0.5, "R(rel=2)@1": 0.0, "nDCG@10": 0.7967075809905066}, abs=1e-9
    )


def test_runs_and_measures_that_do_not_fit_are_refused():
    with pytest.raises(DataError, match="answers none of the 1 judged queries"):
        evaluate({"x": {"p": 1.0}}, {"q": {"p": 1}}, ["RR@10"])
    with pytest.raises(SettingsError, match=r"cannot compute all of Accuracy@5 on these files \(.*zero.*leave out"):
        evaluate({"q": {"d": 1.0}}, {"q": {"d": 1}}, ["Accuracy@5"])
    one, two = Evaluation({"AP": 1.0}, {"AP": {"q": 1.0}}), Evaluation({"AP": 1.0}, {"AP": {"r": 1.0}})
    with pytest.raises(DataError, match="not evaluated on the same queries"):
        compare(one, two)


def test_the_paired_t_test_has_an_answer_where_scipys_has_none():
    assert paired_t_test(np.zeros(3)) == 1.0 and paired_t_test(np.full(3, 0.5)) == 0.0
    assert paired_t_test(np.array([0.5])) is None


def test_the_randomisation_test_is_scipys_exact_one_within_its_draws():
    generator = np.random.default_rng(3)
    for shift in (0.0, 0.2, 0.4):
        a, b = generator.standard_normal(12) + shift, np.zeros(12)
        exact = stats.permutation_test(
            (a, b), lambda x, y: (x - y).mean(), permutation_type="samples", n_resamples=np.inf
        ).pvalue
        # 10,000 draws: a standard deviation of sqrt(p (1 - p) / 10,000) <= 0.005; four of them
        assert randomisation_test(a - b) == pytest.approx(exact, abs=0.02)
    assert randomisation_test(np.zeros(30)) == 1.0
    assert randomisation_test(np.full(30, 0.1)) == pytest.approx(2e-4, rel=0.01), (
        "twice the smaller tail, of 9,999 draws and itself"
    )


def test_an_interval_is_always_the_same_and_near_the_normal_one():
    values = np.random.default_rng(5).random(50).tolist()
    low, high = interval(values)
    assert interval(dict(enumerate(values)).values()) == (low, high) == interval(np.array(values))
    mean, error = np.mean(values), stats.sem(values)
    # the bootstrap's own noise at 10,000 resamples is about 2 % of the interval's width
    assert (low, high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.15 * error)


def test_a_comparison_counts_wins_and_says_which_way():
    better = {f"q{k}": 0.5 + 0.4 * (k % 3 == 0) - 0.1 * (k % 10 == 1) for k in range(90)}
    worse = dict.fromkeys(better, 0.5)
    first, second = (Evaluation({"AP": float(np.mean(list(v.values())))}, {"AP": v}) for v in (better, worse))
    found, mirrored = compare(first, second)["AP"], compare(second, first)["AP"]
    assert (found.wins, found.losses, found.ties) == (30, 6, 54) == (mirrored.losses, mirrored.wins, mirrored.ties)
    assert found.difference == pytest.approx(-mirrored.difference) == pytest.approx(found.mean - found.other_mean)
    assert found.low <= found.difference <= found.high and found.low > 0
    assert found.t_test_p == pytest.approx(mirrored.t_test_p) and found.t_test_p < 1e-4
    same = compare(first, first)["AP"]
    assert (same.difference, same.low, same.high, same.t_test_p, same.randomisation_p) == (0, 0, 0, 1, 1)
