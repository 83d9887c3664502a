"""The statistics of a study against numbers worked out by hand, and what its report says."""

import math

import pytest

from quincunx.engine.retrieval.study_report import Row, compare_rows, holm, make_report


def made_from(steps: int = 10, at_step: int | None = None, train_share: float = 1.0) -> dict:
    return {"made_from": {"pretrain": {"steps": steps}, "at_step": at_step, "train_share": train_share}}


def record(variant: str, seed: int, *values: float, collection: str = "wiki", probe=(0.1, 0.2), **more) -> dict:
    mean = sum(values) / len(values)
    return {
        "collection": collection, "variant": variant, "seed": seed,
        "measures": {"RR@10": {"mean": mean, "low": 0.0, "high": 1.0}}, "per_query": [*values],
        "before": {"mrr@10": 0.05, "ndcg@10": 0.06}, "probe": {"step": [0, 10], "mrr@10": [*probe]},
        "held_out": {"mlm": [7.0, 6.0, 6.5]}, "code": {"commit": "c" * 40, "torch": "2"},
        **made_from(), **more,
    }  # fmt: skip


BM25 = {"wiki": {"measures": {"RR@10": {"mean": 0.625, "low": 0.0, "high": 1.0}}, "per_query": [1, 1, 0.5, 0]}}
NONE = {0: record("none", 0, 0.5, 0.5, 0.0, 1.0), 1: record("none", 1, 0.5, 0.5, 0.5, 0.5)}
MASTER = {0: record("master", 0, 1.0, 1.0, 0.5, 0.5), 1: record("master", 1, 0.5, 1.0, 0.5, 1.0)}


def test_a_query_counts_once_its_values_averaged_over_seeds_first():
    assert Row(NONE).per_query.tolist() == [0.5, 0.5, 0.25, 0.75]
    test = compare_rows(Row(MASTER), Row(NONE))
    # master's averages are 0.75, 1, 0.5, 0.75: differences 0.25, 0.5, 0.25, 0.
    assert test.difference == 0.25 and 0 <= test.low < 0.25 < test.high <= 0.5
    # t = 0.25 / (sqrt(1/24) / 2) = 2.4495 with 3 degrees of freedom, whose p has a closed form.
    x = 0.25 / (math.sqrt(1 / 24) / 2) / math.sqrt(3)
    assert test.queries_p == pytest.approx(1 - 2 / math.pi * (math.atan(x) + x / (1 + x * x)), rel=1e-9)


def test_seeds_are_paired_by_number_and_one_seed_gives_no_p_value():
    # Means over seeds 0 and 1: none 0.5, 0.5; other 0.75, 0.625: t = 0.1875 / 0.0625 = 3 with 1 degree of freedom.
    other = {0: record("other", 0, 1.0, 1.0, 0.5, 0.5), 1: record("other", 1, 0.5, 1.0, 0.5, 0.5)}
    p = 1 - 2 / math.pi * math.atan(3)
    assert compare_rows(Row(other), Row(NONE)).seeds_p == pytest.approx(p, rel=1e-9)
    one = compare_rows(Row({0: other[0], 2: other[1]}), Row(NONE))
    assert one.seeds_p is None and one.difference == 0.25, "the seed that both have, 0, alone counts"
    single = compare_rows(Row({0: record("a", 0, 1.0)}), Row({0: record("b", 0, 0.5)}))
    assert single.queries_p is None, "one query tells nothing"


def test_holm_corrects_from_the_smallest_p_on():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])  # 3 x 0.01; 2 x 0.03; not below the one before
    assert holm([0.6, 0.5]) == [1.0, 1.0] and holm([]) == []


def test_the_report_shows_every_variant_and_leaves_diverged_cells_out(tmp_path):
    records = [*NONE.values(), *MASTER.values(), {"collection": "wiki", "variant": "wild", "seed": 0, "diverged": True}]
    variants = ["none", "master", "wild"]
    paths = make_report(tmp_path, "small", variants, ["none"], records, BM25, 6)
    page = (tmp_path / "report.md").read_text()
    assert "5 of 6 cells. Diverged, and left out of every table: wiki wild seed 0." in page
    assert "| master | 10 | 2 | 0.050 ± 0.000 | 0.750 ± 0.000 |" in page
    assert "| BM25 |  |  |  | 0.625 |" in page and "| wild |" not in page
    assert "| master against none | +0.250 [" in page and "none against none" not in page
    make_report(tmp_path, "small", variants, ["none", "master"], records, BM25, 6)
    assert "none against master" not in (tmp_path / "report.md").read_text(), "a pair is tested once"
    assert "wiki | master | mlm | 7.00 | 6.00 | 6.50" in page
    assert {path.name for path in paths} >= {"report.html", "report.md", "wiki-bars.svg", "probe.svg"}
    assert (tmp_path / "report.html").read_text().count("data:image/svg") == 2


def test_checkpoints_are_compared_with_the_probe_at_their_own_step(tmp_path):
    values = {4: 0.25, 8: 0.75, None: 0.5}
    probe = {"step": [0, 4, 8, 10], "mrr@10": [0.0, 0.1, 0.3, 0.2]}
    records = [
        record(f"run-{at}", 0, value, value, **made_from(at_step=at)) | {"probe": probe} for at, value in values.items()
    ]
    make_report(tmp_path, "steps", [f"run-{at}" for at in values], [], records, BM25, 3)
    page = (tmp_path / "report.md").read_text()
    assert "| wiki | 0 | 1.00 | 3 |" in page and (tmp_path / "steps.svg").exists()


def test_few_labels_make_a_curve_of_each_pre_training(tmp_path):
    shares = {"mlm": 1.0, "mlm-1": 0.01, "mlm-10": 0.1}
    records = [record(name, 0, share, share, **made_from(train_share=share)) for name, share in shares.items()]
    make_report(tmp_path, "few", [*shares], [], records, BM25, 3)
    assert "per cent of the training queries" in (tmp_path / "queries.svg").read_text()
    assert not (tmp_path / "steps.svg").exists(), "all are fine-tuned after the same step"


def test_lines_are_named_though_their_variants_share_no_prefix_and_two_families_stay_apart(tmp_path):
    shares = {"some": 0.1, "all": 1.0}
    records = [record(name, 0, share, share, **made_from(train_share=share)) for name, share in shares.items()]
    make_report(tmp_path, "apart", [*shares], [], records, BM25, 2)
    assert ">some<" in (tmp_path / "queries.svg").read_text()
    records = [
        record(f"{share}-{family}", 0, 0.5, 0.5, **made_from(steps=steps, train_share=share))
        for family, steps in (("mkp", 10), ("cmp", 20))
        for share in (0.1, 0.01)
    ]
    make_report(tmp_path, "families", [found["variant"] for found in records], [], records, BM25, 4)
    plot = (tmp_path / "queries.svg").read_text()
    assert ">0.1-mkp<" in plot and ">0.1-cmp<" in plot


def test_more_variants_than_colours_share_one_legend_and_differ_in_style(tmp_path):
    names = [f"variant-{number}" for number in range(8)]
    records = [record(name, 0, 0.5, 0.5, collection=place) for name in names for place in ("wiki", "new größe")]
    make_report(tmp_path, "many", names, [], records, dict.fromkeys(("wiki", "new größe"), BM25["wiki"]), 16)
    plot = (tmp_path / "probe.svg").read_text()
    assert all(plot.count(f">{name}<") == 1 for name in names), "named once, not once a panel"
    assert "stroke-dasharray" in plot
    assert (tmp_path / "report.html").read_text().count("data:image/svg") == 3, "whatever a collection is called"


def test_a_study_without_cells_reports_that(tmp_path):
    make_report(tmp_path, "empty", ["none"], [], [], {}, 3)
    assert (tmp_path / "report.md").read_text() == "# Study empty\n\n0 of 3 cells.\n"
