"""GLUE's official measures: what its leaderboard and MASTER's Table 8 report, by scikit-learn and scipy.

CoLA: Matthews correlation. MRPC, QQP: accuracy and F1 of class 1. STS-B: Pearson and Spearman correlation.
"""

from pathlib import Path

import numpy as np

from quincunx.data_shards.artefact import written_whole
from quincunx.engine.retrieval.glue_data import HIGHEST_SCORE, TASKS


def measure(name: str, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The task's measures, 1 is perfect: {"mcc"}, {"accuracy", "f1"} or {"pearson", "spearman"}.

    logits: float [N, 2] of a task with classes, float [N] of STS-B, whose scores are taken as they are, not cut to
    0 ... 5. labels: [N]. A correlation with predictions that are all alike is 0.
    """
    if not TASKS[name].classes:
        return {"pearson": _correlation(logits, labels), "spearman": _correlation(logits, labels, by_rank=True)}
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    classes = logits.argmax(axis=1)
    if name == "cola":
        return {"mcc": float(matthews_corrcoef(labels, classes))}
    return {
        "accuracy": float(accuracy_score(labels, classes)),
        "f1": float(f1_score(labels, classes, zero_division=0)),
    }


def _correlation(predicted: np.ndarray, labels: np.ndarray, by_rank: bool = False) -> float:
    from scipy.stats import pearsonr, spearmanr

    if np.ptp(predicted) == 0:
        return 0.0
    predicted, labels = predicted.astype(np.float64), labels.astype(np.float64)
    return float((spearmanr if by_rank else pearsonr)(predicted, labels).statistic)


def write_predictions(path: str | Path, name: str, logits: np.ndarray) -> None:
    """Writes a test file's predictions as GLUE takes them: a header, then index and prediction, tab-separated.

    A class is 0 or 1; a score has three decimals and is cut to 0 ... 5. The index is the row's place in the file,
    from 0.
    """
    with written_whole(path) as file:
        file.write("index\tprediction\n")
        for index, row in enumerate(logits):
            answer = str(row.argmax()) if TASKS[name].classes else f"{min(max(float(row), 0.0), HIGHEST_SCORE):.3f}"
            file.write(f"{index}\t{answer}\n")
