"""Scores candidates with a reranker: teacher scores for a candidates file, or a reranked run.

    python launchers/score.py --model runs/reranker/export/reranker --candidates negatives.jsonl \\
        --corpus corpus.tsv --queries queries.train.tsv --output scored.jsonl
    python launchers/score.py --model runs/reranker/export/reranker --run dev.trec --depth 100 ... --output top.trec
    torchrun --nproc_per_node 8 launchers/score.py ...     # each process takes its share of the parts

The same command again continues where it was stopped, on any number of processes. See docs/mining.md.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from quincunx.data_shards.errors import exit_with_one_sentence
from quincunx.data_shards.setting import setting
from quincunx.engine.ranks import Environment, device_and_precision, discover_environment, one_voice
from quincunx.engine.retrieval.candidates import CANDIDATES, ENDING
from quincunx.launchers.command_line import parse_settings


@dataclass(frozen=True, kw_only=True)
class ScoreSettings:
    """Settings of scoring."""

    model: str
    """Reranker: a sequence-classification folder with one label, a Hugging Face name, or package:NAME/FOLDER."""
    corpus: str = setting(role="data")
    """Passages: BEIR folder, tsv, JSONL or Parquet."""
    queries: str = setting(role="data")
    """Queries: BEIR folder, tsv, JSONL or DPR json."""
    output: str
    """File to write: candidates (.jsonl), or a TREC run; a manifest goes beside it."""
    remake: bool = False
    """Make the output anew if it is there; what was there is moved aside."""
    candidates: str | None = setting(None, role="data")
    """Candidates whose positives and negatives are scored (or give --run)."""
    run: str | None = setting(None, role="data")
    """TREC run that is reranked (or give --candidates)."""
    depth: int | None = setting(None, low=1)
    """Ranks of the run that are scored; deeper ones are left out (None: all)."""
    titles: bool = True
    """Titles belong to the passages' text."""
    max_tokens: int | None = setting(None, low=1)
    """Longest pair; longer ones are cut (None: the model's own limit)."""
    batch_tokens: int = setting(8192, low=1)
    """Maximum number of tokens of one forward."""
    pairs_a_part: int = setting(8192, low=1)
    """Pairs of one part: what a kill loses at most."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs; auto takes the process's GPU where there is one."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the forward; auto is bfloat16 (autocast) on a GPU and float32 elsewhere."""

    def contradictions(self) -> list[str]:
        """What is wrong with values that are each in range, as clauses."""
        problems = []
        if (self.candidates is None) == (self.run is None):
            problems.append("give either --candidates or --run, the pairs to score")
        if self.depth is not None and self.run is None:
            problems.append("depth is of a --run; --candidates are scored whole: leave --depth out")
        if self.candidates is not None and not self.output.endswith(ENDING):
            problems.append(f"candidates cannot be written to {self.output}: give a name in {ENDING}")
        return problems


def main() -> None:
    environment = discover_environment()
    with one_voice(environment):
        score(parse_settings(ScoreSettings, __doc__.split("\n")[0]), environment)


def score(settings: ScoreSettings, environment: Environment) -> None:
    """This rank's share, and on rank 0 the merged file."""
    from quincunx.engine.retrieval.collection import read_passages, read_queries
    from quincunx.engine.retrieval.cross_encoder import load_reranker
    from quincunx.engine.retrieval.files import input_digest
    from quincunx.engine.retrieval.scoring import RUN, Source, score_source

    device, precision = device_and_precision(settings.device, settings.precision, environment)
    path, kind = (settings.run, RUN) if settings.candidates is None else (settings.candidates, CANDIDATES)
    queries, passages = read_queries(settings.queries), read_passages(settings.corpus, titles=settings.titles)
    reranker = load_reranker(settings.model, max_tokens=settings.max_tokens, allow_fresh_head=False)
    made_from = {
        "model": reranker.digest,
        "max_tokens": reranker.max_tokens,
        "precision": precision,
        kind: input_digest(path),
        "depth": settings.depth,
        "queries": queries.digest,
        "corpus": passages.digest,
    }
    counts = score_source(
        Source(path, kind, settings.depth),
        Path(settings.output),
        reranker,
        queries,
        passages,
        made_from,
        environment,
        device=device,
        precision=precision,
        **{name: getattr(settings, name) for name in ("batch_tokens", "pairs_a_part", "remake")},
    )
    if counts is not None:
        print(f"{settings.output}: {counts['pairs']:,} pairs scored")
        if counts["cut"]:
            print(f"  {counts['cut']:,} pairs were longer than {reranker.max_tokens} tokens and were cut")
    elif environment.is_main:
        print(f"{settings.output} is there, made from these files by this model: nothing to do")


if __name__ == "__main__":
    exit_with_one_sentence(main)
