"""The settings of a build of shards; light to import, so that `--help` is quick."""

from dataclasses import dataclass
from typing import Literal

from quincunx.data_shards.setting import setting

TRAIN_PREFIX = "train:"
TRAINED_SIZES = range(300, 1_000_001)
"""Vocabulary sizes of a tokenizer trained on the corpus."""
CorpusFormat = Literal["beir", "msmarco", "dpr", "documents", "parquet", "python_docs"]
SHORTEST_PASSAGE = 4
"""Least max_tokens: [CLS], two tokens, [SEP]."""


@dataclass(frozen=True, kw_only=True)
class BuildSettings:
    """Settings of launchers/build_shards.py."""

    format: CorpusFormat
    """Format of the corpus (docs/corpora.md)."""
    path: str
    """The corpus: a file, a folder or a pattern; for python_docs a list of packages or `default`."""
    output: str
    """Folder that the shard set is written to."""
    tokenizer: str
    """Hugging Face tokenizer (id, folder, package:NAME/FOLDER), or train:8192 to train WordPiece on the corpus."""
    max_tokens: int = setting(144, low=SHORTEST_PASSAGE)
    """Maximum number of tokens of a passage, [CLS] and [SEP] counted."""
    generations: list[str] = setting([])
    """Files or folders of generated queries and continuations, joined by passage id (docs/generations.md)."""
    with_titles: bool = True
    """Whether a document's title counts as text of its first passage (of every passage, in passage collections)."""
    on_bad_record: Literal["stop", "skip"] = "stop"
    """stop at a record that cannot be read, or skip and count it."""
    held_out_share: float = setting(0.01, low=0, below=1)
    """Share of the documents (by hash of their id) kept for the held-out loss, never trained on."""
    probe_queries: int = setting(0, low=0)
    """Maximum number of held-out passages with a natural query that probe/, a BEIR folder, asks for; 0: no probe/."""
    pairs: bool = False
    """Also write pairs/, a BEIR folder to fine-tune on: the training passages and their natural queries."""
    tasks: int = setting(0, low=0)
    """Parts the corpus is cut into; decides the shards' bytes. 0: one for each 8 MiB of input, at most 4096."""
    workers: int = setting(0, low=0)
    """Tasks that run at once. 0: the cores of this machine (local), no limit (slurm, ray)."""
    executor: Literal["local", "slurm", "ray"] = "local"
    """Where tasks run: local, slurm or ray."""
    slurm_partition: str = ""
    """Partition of the Slurm jobs."""
    slurm_time: str = "04:00:00"
    """Time limit of one task under Slurm."""
    slurm_args: list[str] = setting([])
    """Further sbatch arguments as key=value, like account=lab or mem_per_cpu_gb=8."""
    block_samples: int = setting(1024, low=1)
    """Samples of a block, the unit of reading and shuffling."""
    shard_bytes: int = setting(256 * 2**20, low=1)
    """A shard closes at the first block boundary beyond this many bytes."""
    num_buckets: int = setting(2**20, low=1)
    """Slots for the document frequencies of words of several tokens, a power of two."""
    tokenizer_megabytes: int = setting(32, low=1)
    """Text that a tokenizer is trained on, in MB, taken evenly from the corpus."""
    remake: bool = False
    """Build anew; what is there, finished or begun, is moved aside to OUTPUT.old-N."""
    progress: bool = True
    """Whether a progress bar is shown."""

    def contradictions(self) -> list[str]:
        """What is wrong with values that are each in range, as clauses."""
        problems = []
        size = self.tokenizer.removeprefix(TRAIN_PREFIX)
        trainable = size.isascii() and size.isdigit() and int(size) in TRAINED_SIZES
        if self.tokenizer.startswith(TRAIN_PREFIX) and not trainable:
            problems.append(f"tokenizer is {self.tokenizer}; give train:N with N from 300 to 1000000")
        if self.num_buckets & (self.num_buckets - 1):
            problems.append(f"num_buckets is {self.num_buckets}; give a power of two")
        if self.executor == "slurm" and not self.slurm_partition:
            problems.append("executor slurm needs a partition: give slurm_partition")
        if bare := [argument for argument in self.slurm_args if "=" not in argument]:
            problems.append(f'slurm_args has {bare[0]} (the first without "="); write key=value')
        return problems
