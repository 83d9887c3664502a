"""The settings of a build of shards; light to import, so that `--help` is quick."""

from dataclasses import dataclass, field

from quincunx.data_shards.errors import SettingsError
from quincunx.data_shards.manifest import DEFAULT_BLOCK_SAMPLES, DEFAULT_NUM_BUCKETS, DEFAULT_SHARD_BYTES

TRAIN_PREFIX = "train:"
TRAINED_SIZES = range(300, 1_000_001)
"""Vocabulary sizes of a tokenizer trained on the corpus."""
SHORTEST_PASSAGE = 4
"""Least max_tokens: [CLS], two tokens, [SEP]."""
EXECUTORS = ("local", "slurm", "ray")


@dataclass(frozen=True, kw_only=True)
class BuildSettings:
    """Settings of launchers/build_shards.py."""

    format: str
    """Format of the corpus: beir, msmarco, dpr, documents, parquet or python_docs (docs/corpora.md)."""
    path: str
    """The corpus: a file, a folder or a pattern; for python_docs a list of packages or `default`."""
    output: str
    """Folder that the shard set is written to."""
    tokenizer: str
    """Hugging Face tokenizer (id, folder, package:NAME/FOLDER), or train:8192 to train WordPiece on the corpus."""
    max_tokens: int = 144
    """Most tokens of a passage, [CLS] and [SEP] counted."""
    generations: list[str] = field(default_factory=list)
    """Files or folders of generated queries and continuations, joined by passage id (docs/generations.md)."""
    with_titles: bool = True
    """Whether a document's title counts as text of its first passage (of every passage, in passage collections)."""
    on_bad_record: str = "stop"
    """stop at a record that cannot be read, or skip and count it."""
    held_out_share: float = 0.01
    """Share of the documents (by hash of their id) kept for the held-out loss, never trained on."""
    probe_queries: int = 0
    """Most held-out passages with a natural query that are written as a BEIR folder, probe/; 0 writes none."""
    pairs: bool = False
    """Also write pairs/, a BEIR folder to fine-tune on: the training passages and their natural queries."""
    tasks: int = 0
    """Parts the corpus is cut into; decides the shards' bytes. 0: one for each 8 MiB of input, at most 4096."""
    workers: int = 0
    """Tasks that run at once. 0: the cores of this machine (local), no limit (slurm, ray)."""
    executor: str = "local"
    """Where tasks run: local, slurm or ray."""
    slurm_partition: str = ""
    """Partition of the Slurm jobs."""
    slurm_time: str = "04:00:00"
    """Time limit of one task under Slurm."""
    slurm_args: list[str] = field(default_factory=list)
    """Further sbatch arguments as key=value, like account=lab or mem_per_cpu_gb=8."""
    block_samples: int = DEFAULT_BLOCK_SAMPLES
    """Samples of a block, the unit of reading and shuffling."""
    shard_bytes: int = DEFAULT_SHARD_BYTES
    """A shard closes at the first block boundary beyond this many bytes."""
    num_buckets: int = DEFAULT_NUM_BUCKETS
    """Slots for the document frequencies of words of several tokens, a power of two."""
    tokenizer_megabytes: int = 32
    """Text that a tokenizer is trained on, in MB, taken evenly from the corpus."""
    overwrite: bool = False
    """Build anew where the output folder holds a shard set, or an unfinished build with other settings."""
    progress: bool = True
    """Whether a progress bar is shown."""


def check_settings(settings: BuildSettings) -> None:
    """Raises SettingsError for values out of range, all at once."""
    power_of_two = settings.num_buckets > 0 and settings.num_buckets & (settings.num_buckets - 1) == 0
    to_train = settings.tokenizer.startswith(TRAIN_PREFIX)
    size = settings.tokenizer.removeprefix(TRAIN_PREFIX) if to_train else str(TRAINED_SIZES[0])
    trainable = size.isascii() and size.isdigit() and int(size) in TRAINED_SIZES
    problems = [
        problem
        for problem, holds in {
            f"max_tokens is {settings.max_tokens}, give {SHORTEST_PASSAGE} or more": settings.max_tokens
            < SHORTEST_PASSAGE,
            f"tokenizer is {settings.tokenizer}, give train:N with N from 300 to 1000000": not trainable,
            f"tokenizer_megabytes is {settings.tokenizer_megabytes}, give 1 or more": settings.tokenizer_megabytes < 1,
            f"held_out_share is {settings.held_out_share}, give 0 or more and less than 1": not (
                0 <= settings.held_out_share < 1
            ),
            f"on_bad_record is {settings.on_bad_record}, give stop or skip": settings.on_bad_record
            not in ("stop", "skip"),
            f"tasks is {settings.tasks}, give 1 or more, or 0 for the default": settings.tasks < 0,
            f"workers is {settings.workers}, give 1 or more, or 0 for the default": settings.workers < 0,
            f"executor is {settings.executor}, give {', '.join(EXECUTORS)}": settings.executor not in EXECUTORS,
            "executor slurm needs slurm_partition": settings.executor == "slurm" and not settings.slurm_partition,
            f"block_samples is {settings.block_samples}, give 1 or more": settings.block_samples < 1,
            f"shard_bytes is {settings.shard_bytes}, give 1 or more": settings.shard_bytes < 1,
            f"num_buckets is {settings.num_buckets}, give a power of two": not power_of_two,
            f"probe_queries is {settings.probe_queries}, give 0 or more": settings.probe_queries < 0,
            "slurm_args are written key=value": not all("=" in argument for argument in settings.slurm_args),
        }.items()
        if holds
    ]
    if problems:
        raise SettingsError("; ".join(problems))
