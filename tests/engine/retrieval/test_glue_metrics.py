"""GLUE's measures against formulas written out here, on drawn predictions with ties."""

import math

import numpy as np
import pytest

from quincunx.engine.retrieval.glue_metrics import measure, write_predictions

# 1e-12: sums of some hundred float64 terms in another order.
EXACT = {"rel": 1e-12, "abs": 1e-12}


def drawn(seed, number=237):
    draw = np.random.default_rng(seed)
    labels = (draw.random(number) < 0.3).astype(np.int64)
    logits = draw.normal(size=(number, 2)).astype(np.float32)
    logits[:, 1] += labels - 0.4
    return logits, labels


def counts(logits, labels):
    says = [b > a for a, b in logits.tolist()]
    true = [label == 1 for label in labels.tolist()]
    pairs = list(zip(says, true, strict=True))
    return (
        pairs.count((True, True)), pairs.count((False, False)), pairs.count((True, False)), pairs.count((False, True))
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
def test_cola_is_the_matthews_correlation_of_the_confusion_counts(seed):
    logits, labels = drawn(seed)
    tp, tn, fp, fn = counts(logits, labels)
    expected = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert 0.1 < expected < 0.9
    assert measure("cola", logits, labels) == {"mcc": pytest.approx(expected, **EXACT)}


@pytest.mark.parametrize("task", ["mrpc", "qqp"])
def test_paraphrases_have_accuracy_and_f1_of_class_1(task):
    logits, labels = drawn(4)
    tp, tn, fp, fn = counts(logits, labels)
    expected = {"accuracy": (tp + tn) / len(labels), "f1": 2 * tp / (2 * tp + fp + fn)}
    assert abs(expected["accuracy"] - expected["f1"]) > 0.05
    assert measure(task, logits, labels) == {name: pytest.approx(value, **EXACT) for name, value in expected.items()}


def mean_ranks(values):
    """Ranks from 1, of ties their mean."""
    return [sum(other < v for other in values) + (values.count(v) + 1) / 2 for v in values]


def correlation(xs, ys):
    x, y = math.fsum(xs) / len(xs), math.fsum(ys) / len(ys)
    products = math.fsum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True))
    return products / math.sqrt(math.fsum((a - x) ** 2 for a in xs) * math.fsum((b - y) ** 2 for b in ys))


def test_similarity_has_pearson_and_spearman_with_ties_at_their_mean_rank():
    draw = np.random.default_rng(5)
    labels = (draw.integers(0, 21, 150) / 4).astype(np.float32)
    scores = np.round(np.exp(labels) + draw.normal(0, 2, 150), 1).astype(np.float32)
    xs, ys = scores.astype(float).tolist(), labels.astype(float).tolist()
    assert len(set(xs)) < 150 and len(set(ys)) < 22
    expected = {"pearson": correlation(xs, ys), "spearman": correlation(mean_ranks(xs), mean_ranks(ys))}
    assert abs(expected["pearson"] - expected["spearman"]) > 0.01
    assert measure("stsb", scores, labels) == {name: pytest.approx(value, **EXACT) for name, value in expected.items()}


def test_a_model_that_always_says_the_same_has_no_correlation_and_no_warning(recwarn):
    labels = np.array([0, 1, 1], np.int64)
    same = np.tile(np.array([1.0, 0.0], np.float32), (3, 1))
    assert measure("cola", same, labels) == {"mcc": 0.0}
    assert measure("qqp", same, labels) == {"accuracy": pytest.approx(1 / 3), "f1": 0.0}
    assert measure("stsb", np.ones(3, np.float32), labels.astype(np.float32)) == {"pearson": 0.0, "spearman": 0.0}
    assert not list(recwarn)


def test_predictions_are_written_as_glue_takes_them(tmp_path):
    path = tmp_path / "MRPC.tsv"
    write_predictions(path, "mrpc", np.array([[0.2, 0.1], [-1, 3]], np.float32))
    assert path.read_text() == "index\tprediction\n0\t0\n1\t1\n"
    write_predictions(path, "stsb", np.array([-0.2, 5.01, 3.14159], np.float32))
    assert path.read_text() == "index\tprediction\n0\t0.000\n1\t5.000\n2\t3.142\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["MRPC.tsv"]
