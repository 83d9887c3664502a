"""What a committed checkpoint costs beside DeepSpeed's own save: seconds to commit, to verify, to convert.

    python benchmarks/checkpoint.py [--layers 12 --hidden 768] [--output benchmarks/results/checkpoint.json]

One process on the CPU, ZeRO 2, an encoder of the given size with five enhanced decoders, AdamW moments in place. The
plain save is DeepSpeed's, without digest, fsync, manifest and rename; both write the same bytes to the same disk.
"""

import argparse
import json
import platform
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from quincunx.data_shards.tasks import TaskSpec

TASKS = ("mkp", "cmp", "npr", "dor", "gor")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--vocab", type=int, default=30522)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-", dir=arguments.folder))
    try:
        result = measure(arguments, folder)
    finally:
        shutil.rmtree(folder)
    for name, value in result.items():
        print(f"{name:28} {value}")
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


def measure(arguments: argparse.Namespace, folder: Path) -> dict:
    import deepspeed
    import torch
    import torch.distributed as dist

    from quincunx.engine.checkpoint import convert, save_checkpoint, step_name, verify

    engine = start_engine(arguments)
    plain_engine = engine.checkpoint_engine
    group = dist.group.WORLD
    plain, committed = [], []
    for repeat in range(arguments.repeats):
        engine.checkpoint_engine = plain_engine
        began = time.perf_counter()
        engine.save_checkpoint(str(folder / "plain"), tag="x", save_latest=False)
        plain.append(time.perf_counter() - began)
        shutil.rmtree(folder / "plain")
        began = time.perf_counter()
        failure = save_checkpoint(engine, group, folder, repeat, {}, keep=1)
        committed.append(time.perf_counter() - began)
        assert failure is None, failure
    newest = folder / step_name(arguments.repeats - 1)
    began = time.perf_counter()
    checkpoint = verify(newest)
    verified = time.perf_counter() - began
    began = time.perf_counter()
    convert(checkpoint)
    converted = time.perf_counter() - began
    return {
        "parameters": sum(parameter.numel() for parameter in engine.module.parameters()),
        "bytes": sum(file.stat().st_size for file in newest.iterdir()),
        "plain_save_seconds": round(statistics.median(plain), 3),
        "commit_seconds": round(statistics.median(committed), 3),
        "verify_seconds": round(verified, 3),
        "convert_seconds": round(converted, 3),
        "repeats": arguments.repeats,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
        "machine": platform.machine(),
        "processors": torch.get_num_threads(),
    }


def start_engine(arguments: argparse.Namespace):
    """A DeepSpeed engine on one rank that has made one optimizer step."""
    import deepspeed
    import torch

    from quincunx.engine.model import build_model
    from quincunx.engine.ranks import discover_environment
    from quincunx.engine.settings import PretrainSettings, load_machine
    from quincunx.engine.training import parameter_groups

    discover_environment({}).export()
    deepspeed.utils.logger.setLevel("WARNING")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    shape = {
        "hidden_size": arguments.hidden,
        "num_hidden_layers": arguments.layers,
        "num_attention_heads": arguments.hidden // 64,
        "intermediate_size": 4 * arguments.hidden,
    }
    tasks = [TaskSpec(name=name, decoder="enhanced") for name in TASKS]
    model = build_model("bert", tasks, max_tokens=144, from_scratch=shape, vocab_size=arguments.vocab, pad_token_id=0)
    config = load_machine(PretrainSettings(steps=1, global_batch=1), world_size=1, cuda=False).config
    engine, *_ = deepspeed.initialize(model=model, model_parameters=parameter_groups(model, 0.01), config=config)
    engine.backward(
        sum(parameter.square().sum() for parameter in engine.module.parameters() if parameter.requires_grad)
    )
    engine.step()
    assert torch.distributed.get_world_size() == 1
    return engine


if __name__ == "__main__":
    main()
