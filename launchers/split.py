"""Writes one split of a data set for the chain: its judged queries (all, or a sample), judgements, answers, a probe.

    python launchers/split.py --queries queries.jsonl --qrels qrels/train.tsv --output train --sample 2000
    python launchers/split.py --queries nq-train.json --output train      # DPR: judgements and answers are its own

See docs/chains.md.
"""

import json
from dataclasses import dataclass
from typing import Literal

from quincunx.data_shards.errors import exit_with_one_sentence
from quincunx.data_shards.setting import setting
from quincunx.launchers.command_line import parse_settings


@dataclass(frozen=True, kw_only=True)
class SplitSettings:
    """Settings of a split."""

    queries: str = setting(role="data")
    """Queries: BEIR folder, tsv, JSONL, or DPR's json or csv."""
    output: str
    """Folder to write: queries.jsonl, qrels.tsv, answers.jsonl, probe/."""
    remake: bool = False
    """Make the output anew if it is there; what was there is moved aside."""
    qrels: str | None = setting(None, role="data")
    """Judgements: BEIR tsv, TREC or MS MARCO qrels (default: the positives of a DPR json)."""
    answers: str | None = setting(None, role="data")
    """Answers: DPR json or csv, or JSONL with query_id, answers (default: those in a DPR file)."""
    corpus: str | None = setting(None, role="data")
    """Passages; only a probe needs them."""
    titles: bool = True
    """Titles belong to the passages' text."""
    sample: int | None = setting(None, low=1)
    """Queries that are kept, chosen by a hash of their ids (default: all that are judged)."""
    probe_queries: int = setting(0, low=0)
    """Queries of the probe, of those that are kept."""
    probe_passages: int = setting(500, low=1)
    """Passages of the probe: its queries' positives, and others up to this number."""
    unknown_ids: Literal["stop", "drop"] = "stop"
    """What to do with judgements of unknown queries and with queries without a relevant passage."""
    seed: int = setting(0, low=0)
    """Of the sample."""


def main() -> None:
    settings = parse_settings(SplitSettings, __doc__.split("\n")[0])
    import xxhash

    from quincunx.data_shards.artefact import artefact
    from quincunx.engine.retrieval.collection import read_passages
    from quincunx.engine.retrieval.splits import read_split, write_split

    queries, qrels, answers, left_out = read_split(
        settings.queries, settings.qrels, settings.answers, settings.unknown_ids == "drop"
    )
    needs_passages = settings.probe_queries and settings.corpus is not None
    passages = read_passages(settings.corpus, titles=settings.titles) if needs_passages else None
    sizes = {name: getattr(settings, name) for name in ("sample", "probe_queries", "probe_passages", "seed")}
    made_from = {
        **sizes,
        "unknown_ids": settings.unknown_ids,
        "titles": settings.titles,
        "queries": queries.digest,
        "judged": xxhash.xxh3_128_hexdigest(json.dumps([qrels, answers]).encode()),
        "corpus": None if passages is None else passages.digest,
    }
    output = settings.output
    with artefact(output, "split", made_from, remake=settings.remake) as work:
        if work is None:
            print(f"{output} is there, made from these files by these settings: nothing to do")
            return
        folder = work.made("queries.jsonl").parent
        counts = write_split(folder, queries, qrels, answers, passages, **sizes)
        work.details = counts
    print(f"{output}: " + ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in counts.items()))
    for name, count in left_out.items():
        if count:
            print(f"left out: {count:,} {name.replace('_', ' ')}")


if __name__ == "__main__":
    exit_with_one_sentence(main)
