"""Measures a run against judgements: every mean with its interval, and against a second run with paired tests.

    python launchers/evaluate.py --run RUN --qrels QRELS                                 # MRR@10, nDCG@10, MAP, recalls
    python launchers/evaluate.py --run RUN --qrels QRELS --compare OTHER_RUN --output result.json --per_query all.tsv
    python launchers/evaluate.py --run RUN --qrels 2019qrels-pass.txt --relevant_from 2   # TREC DL
    python launchers/evaluate.py --run RUN --answers nq-test.csv --corpus psgs_w100.tsv   # answer match at 20 and 100

Values are ir-measures' own. See docs/evaluation.md.
"""

from dataclasses import dataclass
from typing import Literal

from quincunx.data_shards.errors import DataError, exit_with_one_sentence
from quincunx.data_shards.setting import setting
from quincunx.launchers.command_line import parse_settings


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """Settings of an evaluation."""

    run: str = setting(role="data")
    """Run in TREC's format (qid Q0 pid rank score tag), also .gz."""
    qrels: str | None = setting(None, role="data")
    """Judgements: BEIR tsv, TREC or MS MARCO qrels."""
    compare: str | None = setting(None, role="data")
    """A second run; differences are run minus this one."""
    measures: tuple[str, ...] = ("MRR@10", "nDCG@10", "MAP", "R@50", "R@100", "R@1000")
    """Names of ir-measures, or MRR, MAP, Recall for RR, AP, R."""
    relevant_from: int = setting(1, low=1)
    """Lowest grade that counts as relevant for MRR, MAP, recall, precision (TREC DL: 2); nDCG uses the grades."""
    output: str | None = None
    """File (.json) for everything that is printed, with digests of the files."""
    per_query: str | None = None
    """File (.jsonl or .tsv) for the values of every query."""
    queries: str | None = setting(None, role="data")
    """Queries, to check that qrels and runs name no others: BEIR folder, jsonl, tsv."""
    corpus: str | None = setting(None, role="data")
    """Passages, to check that qrels and runs name no others, and for answer match: BEIR folder, tsv, jsonl, parquet."""
    unknown_ids: Literal["stop", "drop"] = "stop"
    """What to do with lines of qrels and runs that name unknown queries or passages."""
    no_positives: Literal["stop", "keep", "drop"] = "stop"
    """What to do with judged queries without a relevant passage: keep counts them as 0, as ir-measures does."""
    ignore_identical_ids: bool = False
    """Leave out of the runs a passage that has its query's id, as BEIR's evaluation does (ArguAna, Quora)."""
    answers: str | None = setting(None, role="data")
    """Answers for answer match: DPR's .json or .csv, or JSONL with query_id and answers; needs --corpus."""
    answer_depths: tuple[int, ...] = setting((20, 100), low=1)
    """Depths of answer match."""
    answer_regex: bool = False
    """Answers are regular expressions (CuratedTREC)."""

    def contradictions(self) -> list[str]:
        """What is wrong with values that are each in range, as clauses."""
        problems = []
        if self.qrels is None and self.answers is None:
            problems.append("nothing to judge by: give --qrels, or --answers with --corpus, or all of them")
        if self.answers is not None and self.corpus is None:
            problems.append("answer match reads the passages: give --corpus beside --answers")
        for name in ("measures", "answer_depths"):
            if not getattr(self, name):
                problems.append(f"{name} is given without a value: give at least one, or leave it out")
        for name, endings in (("output", (".json",)), ("per_query", (".jsonl", ".tsv"))):
            path = getattr(self, name)
            if path is not None and not path.endswith(endings):
                problems.append(f"{name} is {path}: give a name ending in {' or '.join(endings)}")
        return problems


def check_measures(settings: EvaluateSettings) -> list[str]:
    """Raises SettingsError for a measure that ir-measures does not know."""
    from quincunx.engine.retrieval.evaluation import find_measure

    for name in settings.measures:
        find_measure(name, settings.relevant_from)
    return []


def main() -> None:
    settings = parse_settings(EvaluateSettings, __doc__.split("\n")[0], find_more=check_measures)
    from quincunx.engine.retrieval import evaluation, trec
    from quincunx.engine.retrieval.answers import answer_hits
    from quincunx.engine.retrieval.collection import read_passages, read_queries
    from quincunx.engine.retrieval.files import refuse_input

    inputs = {name: getattr(settings, name) for name in ("run", "qrels", "compare", "answers", "queries", "corpus")}
    for written in filter(None, (settings.output, settings.per_query)):
        refuse_input(written, settings)
    queries = read_queries(settings.queries) if settings.queries is not None else None
    # Answers are searched in the text alone, as DPR does; for ids it makes no difference.
    passages = read_passages(settings.corpus, titles=False) if settings.corpus is not None else None
    drop = settings.unknown_ids == "drop"
    qrels, answers, dropped = None, None, {}
    if settings.qrels is not None:
        hint = "choose --no_positives keep (they count 0) or drop"
        found = trec.read_qrels(settings.qrels)
        checked = trec.check_qrels(found, settings.qrels, queries, passages, drop, settings.no_positives, hint)
        qrels, dropped["qrels"] = checked
    if settings.answers is not None:
        found = trec.read_answers(settings.answers)
        answers, dropped["answers"] = trec.check_against(found, queries, None, settings.answers, drop)
    if None not in (qrels, answers) and qrels.keys() != answers.keys():
        raise DataError(
            f"the qrels judge {len(qrels)} queries and the answers cover {len(answers)}, of which "
            f"{len(qrels.keys() & answers.keys())} are the same: give both for the same queries, or one at a time"
        )
    results = []
    for name in [name for name in ("run", "compare") if inputs[name] is not None]:
        run, dropped[name] = trec.check_against(trec.read_run(inputs[name]), queries, passages, inputs[name], drop)
        if settings.ignore_identical_ids:
            dropped[name]["identical_ids"] = sum(scores.pop(id, None) is not None for id, scores in run.items())
        parts = []
        if qrels is not None:
            parts.append(evaluation.evaluate(run, qrels, settings.measures, settings.relevant_from))
        if answers is not None:
            parts.append(answer_hits(run, answers, passages, settings.answer_depths, settings.answer_regex))
        results.append(evaluation.joined(parts))
    made_from = {name: inputs[name] for name in ("run", "qrels", "compare", "answers") if inputs[name] is not None}
    record = evaluation.make_record(results[0], made_from, settings.relevant_from, *results[1:]) | {"dropped": dropped}
    print(evaluation.format_table(record))
    for source, counts in dropped.items():
        for what, count in counts.items():
            if count and (what != "queries_without_positives" or settings.no_positives == "drop"):
                print(f"left out of the {source}: {count} {what.replace('_', ' ')}")
    if settings.per_query is not None:
        evaluation.write_per_query(settings.per_query, *results)
    if settings.output is not None:
        evaluation.write_record(settings.output, record)


if __name__ == "__main__":
    exit_with_one_sentence(main)
