"""Mines hard negatives from a run: training queries with positives and negatives, and what each filter left out.

    python launchers/mine.py --run bm25.trec --qrels qrels.train.tsv --corpus corpus.tsv --queries queries.train.tsv \\
        --output negatives.jsonl --depth 200

See docs/mining.md.
"""

from dataclasses import dataclass, fields

from quincunx.data_shards.errors import exit_with_one_sentence
from quincunx.data_shards.setting import setting
from quincunx.engine.retrieval.candidates import CANDIDATES, ENDING
from quincunx.engine.retrieval.files import input_digest, refuse_input
from quincunx.engine.retrieval.mining import MiningRules
from quincunx.launchers.command_line import parse_settings


@dataclass(frozen=True, kw_only=True)
class MineSettings(MiningRules):
    """Settings of mining."""

    run: str = setting(role="data")
    """TREC run, lines of one query together: of BM25 or of a retriever."""
    qrels: str = setting(role="data")
    """Judgements: TREC, BEIR or MS MARCO form."""
    corpus: str = setting(role="data")
    """Passages of the run: BEIR folder, tsv, JSONL or Parquet."""
    queries: str = setting(role="data")
    """Queries of the run: BEIR folder, tsv, JSONL or DPR json."""
    output: str
    """File of candidates to write, .jsonl; a manifest with all counts goes beside it."""
    remake: bool = False
    """Make the output anew if it is there; what was there is moved aside."""
    titles: bool = False
    """Answers are looked for in titles too (DPR's rule: in the text only)."""
    answers: str | None = setting(None, role="data")
    """Answers of the queries: a passage that contains one is no negative. DPR json, or JSONL with query_id, answers."""
    teacher_scores: str | None = setting(None, role="data")
    """Candidates of this run with scores, of score.py: switches the teacher's margin on."""

    def contradictions(self) -> list[str]:
        problems = super().contradictions()
        for name, without in (("margin", 0.0), ("margin_from", "best")):
            if self.teacher_scores is None and getattr(self, name) != without:
                problems.append(f"{name} counts from a teacher's scores: give --teacher_scores, or leave it out")
        if not self.output.endswith(ENDING):
            problems.append(f"candidates cannot be written to {self.output}: give a name in {ENDING}")
        return problems


def main() -> None:
    settings = parse_settings(MineSettings, __doc__.split("\n")[0])
    refuse_input(settings.output, settings)
    from quincunx.data_shards.artefact import artefact
    from quincunx.engine.retrieval.candidates import iterate_candidates, write_candidates
    from quincunx.engine.retrieval.collection import read_passages, read_queries
    from quincunx.engine.retrieval.mining import TeacherScores, mine
    from quincunx.engine.retrieval.progress import progress_bar
    from quincunx.engine.retrieval.trec import check_against, read_answers, read_qrels, stream_run

    drop = settings.unknown_ids == "drop"
    qrels = read_qrels(settings.qrels)
    queries, passages = read_queries(settings.queries), read_passages(settings.corpus, titles=settings.titles)
    answers = None
    if settings.answers is not None:
        answers, _ = check_against(read_answers(settings.answers), queries, None, settings.answers, drop=True)
    inputs = {name: getattr(settings, name) for name in ("run", "qrels", "answers", "teacher_scores")}
    made_from = {
        "rules": {field.name: getattr(settings, field.name) for field in fields(MiningRules)},
        "queries": queries.digest,
        "corpus": passages.digest,
        **{name: None if path is None else input_digest(path) for name, path in inputs.items()},
    }
    counts: dict[str, int] = {}
    with artefact(settings.output, CANDIDATES, made_from, single=True, remake=settings.remake) as work:
        if work is None:
            print(f"{settings.output} is there, made from these files by these rules: nothing to do")
            return
        qrels, unknown = check_against(qrels, queries, passages, settings.qrels, drop)
        teacher = None
        if settings.teacher_scores is not None:
            teacher = TeacherScores(iterate_candidates(settings.teacher_scores), settings.teacher_scores)
        run = progress_bar("mine", "query", stream_run(settings.run, settings.depth))
        rows = mine(run, qrels, queries, passages, settings, counts, answers=answers, teacher=teacher)
        work.details = write_candidates(work.made(), rows) | {"mining": counts, "judgements_dropped": unknown}
    width = max(map(len, counts))
    print(f"{settings.output}")
    for name, count in counts.items():
        if count:
            print(f"  {name.replace('_', ' '):{width}}  {count:,}")
    for what, count in unknown.items():
        if count:
            print(f"  {count:,} judgements of {what.replace('_', ' ')} were left out")


if __name__ == "__main__":
    exit_with_one_sentence(main)
