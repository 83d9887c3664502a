"""The pre-training tasks: which text each decodes, which shard field that needs, and how its hidden words are drawn.

MASTER (section 4.2) has five tasks, RetroMAE one; each can be served by a masked or by an enhanced decoder
(formulas: docs/stream.md). This file imports nothing heavy: settings are checked against it before anything starts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quincunx.data_shards.errors import SettingsError

ENCODER_CODE = 0
"""Task code of the draw of the words that the encoder's text hides."""
CORRUPTION_CODE = 1
"""Task code of the 80/10/10 draws of the encoder's text."""
DECODER_CORRUPTION_CODE = 32
"""Added to a task's own code: the 80/10/10 draws of its masked decoder's text."""


@dataclass(frozen=True, kw_only=True)
class TaskKind:
    """What the papers fix of a task."""

    code: int
    """Task code folded into the hash key: fixed for ever, else old runs draw other masks."""
    field: str
    """Shard field of the task's text: passage, next (the document's next passage), or one of GENERATED."""
    draw: str
    """How hidden words are drawn: keyword (by TF-IDF), uniform, complement (of the encoder's)."""
    title: str
    """Full name, for tables and errors."""


TASKS: dict[str, TaskKind] = {
    "mkp": TaskKind(code=2, field="passage", draw="keyword", title="masked keyword prediction"),
    "cmp": TaskKind(code=3, field="passage", draw="complement", title="complementary mask prediction"),
    "npr": TaskKind(code=4, field="next", draw="keyword", title="neighbouring passage recovering"),
    "dor": TaskKind(code=5, field="queries", draw="uniform", title="doc2query outputs recovering"),
    "gor": TaskKind(code=6, field="continuation", draw="uniform", title="GPT-2 outputs recovering"),
    "retromae": TaskKind(code=7, field="passage", draw="uniform", title="RetroMAE passage recovering"),
}

GENERATED: dict[str, type] = {"queries": list, "continuation": str}
"""Fields that generation files bring, and what a record holds: a string, or a list of them (stored with [SEP] between).

A new field is named here, and the task that decodes it in TASKS; old shard sets stay readable.
"""


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """One task of a run: its name in TASKS, its kind of decoder, the weight lambda of its loss."""

    name: str
    decoder: str
    weight: float = 1.0

    @property
    def kind(self) -> TaskKind:
        return TASKS[self.name]


def field_of(task_name: str, neighbour: str) -> str:
    """Shard field that a task reads: npr reads the passage itself when its neighbour is the passage's second half."""
    field = TASKS[task_name].field
    return "passage" if field == "next" and neighbour == "halves" else field


def shares_served(
    counts: Sequence[Mapping[str, int]], weights: Sequence[int], task_names: Sequence[str], neighbour: str
) -> list[float]:
    """Each task's share of the passages that a step reads: those that have the text it decodes.

    `counts`: for each shard set, how many samples have each field (passage, next, queries, continuation), as its
    manifest says; `weights`: the sets' shares of a step. Raises SettingsError naming every task that no set serves.
    """
    shares, problems = [], []
    for name in task_names:
        field = field_of(name, neighbour)
        of_set = [found.get(field, 0) / max(1, found["passage"]) for found in counts]
        shares.append(sum(weight * share for weight, share in zip(weights, of_set, strict=True)) / sum(weights))
        if not shares[-1]:
            remedy = f"run `python launchers/generate.py --task {field}`, rebuild the shards with `--generations`"
            if field == "next":
                remedy = "build the shards from documents with several passages each, or set --neighbour halves"
            problems.append(f"{name} ({TASKS[name].title}), which needs the field {field!r}: {remedy}")
    if problems:
        raise SettingsError(
            "no given shard set serves the task " + "; nor ".join(problems) + "; or leave the task out of --tasks"
        )
    return shares
