"""Held-out losses: right for one rank, and the same, without a dead-lock, for two ranks under ZeRO-3."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from quincunx.data_shards.packer import Packer
from quincunx.data_shards.shards import open_shards
from quincunx.data_shards.tasks import TaskSpec
from quincunx.data_shards.tokenizer import load_tokenizer
from quincunx.engine.evaluations import load_held_out, load_probe, pack_all, run_held_out, run_probe, spread_samples
from quincunx.engine.model import PretrainModel, build_model

ROOT = Path(__file__).parents[2]
TASKS = [TaskSpec(name="mkp", decoder="masked"), TaskSpec(name="dor", decoder="enhanced")]
CPU = torch.device("cpu")


def make_packer(shard_sets: list, split: str) -> Packer:
    return Packer(
        shard_sets,
        TASKS,
        encoder_mask_rate=0.3,
        decoder_mask_rate=0.5,
        corruption="80-10-10",
        neighbour="next",
        max_tokens=40,
        seed=1,
        split=split,
    )


def make_model(vocab_size: int) -> PretrainModel:
    torch.manual_seed(0)
    shape = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
    }
    return build_model("bert", TASKS, max_tokens=40, from_scratch=shape, vocab_size=vocab_size)


@pytest.fixture(scope="module")
def shards(small_shards):
    return open_shards(str(small_shards))


def test_losses_are_means_over_all_labelled_tokens_whatever_the_batches(shards):
    held_out, train = make_packer([shards], "heldout"), make_packer([shards], "train")
    model = make_model(shards.manifest.vocab_size).train()
    small = run_held_out(model, load_held_out(held_out, train, 20, 3), CPU)
    assert model.training, "the evaluation left the model in evaluation mode"

    (batch,) = pack_all(held_out, *spread_samples(held_out, 20), 20)
    with torch.no_grad():
        output = model.eval()(batch, torch.tensor(batch.num_labels(), dtype=torch.float32))
    for row, task in enumerate(("mlm", "mkp", "dor")):
        assert small[f"held_out/loss/{task}"] == pytest.approx(
            float(output.nll_sums[row]) / batch.num_labels()[row], rel=1e-5
        )
        assert small[f"held_out/accuracy/{task}"] == int(output.correct[row]) / batch.num_labels()[row]
    # Means over the whole batch, weighted 1 each: the loss of the training step itself.
    total = sum(small[f"held_out/loss/{task}"] for task in ("mlm", "mkp", "dor"))
    assert total == pytest.approx(float(output.loss), rel=1e-5)
    assert run_held_out(model, load_held_out(held_out, train, 20, 3), CPU) == small


def test_the_unigram_scores_the_same_tokens_by_their_frequency_as_labels_in_training(shards):
    held_out, train = make_packer([shards], "heldout"), make_packer([shards], "train")
    loaded = load_held_out(held_out, train, 20, 7)
    trained = pack_all(train, *spread_samples(train, 4096), 50)
    counts = Counter(int(label) for batch in trained for label in batch.tasks["dor"].labels.ids)
    labels = [int(label) for batch in loaded.batches for label in batch.tasks["dor"].labels.ids]
    total, size = sum(counts.values()), shards.manifest.vocab_size
    # log_probabilities chooses the pseudo-count from these, by leave-one-out likelihood of the counts.
    candidates = [
        -np.mean([np.log((counts[label] + pseudo) / (total + pseudo * size)) for label in labels])
        for pseudo in (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    ]
    assert min(abs(loaded.unigram["dor"] - value) for value in candidates) < 1e-12
    assert 3 < loaded.unigram["dor"] < np.log(size) + 1


def test_passages_are_shared_by_the_sets_of_a_mixture_and_none_held_out_is_none(shards, small_shards, tmp_path):
    mixture = make_packer([shards, shards], "heldout")
    datasets, samples = spread_samples(mixture, 9)
    number = shards.num_samples("heldout")
    assert datasets.tolist() == [0] * 5 + [1] * 4
    assert samples.tolist() == [number * i // 5 for i in range(5)] + [number * i // 4 for i in range(4)], "spread"
    in_rows = spread_samples(mixture, 9, in_a_row=2)[1].tolist()
    assert in_rows[:5] == [0, 1, number * 2 // 5, number * 2 // 5 + 1, number * 4 // 5], "two side by side"
    for in_a_row in (1, 4):
        datasets, samples = spread_samples(mixture, 1000, in_a_row)
        assert samples.tolist() == [*range(number), *range(number)], "all of them, each once"

    from quincunx.data_shards.shard_writer import Sample, write_shard_set

    text = shards.read_block("train", 0).text("passage", 0)
    documents = [[Sample("only", text, text, None)]]
    write_shard_set(tmp_path / "shards", small_shards / "tokenizer", documents, max_tokens=40)
    alone = open_shards(str(tmp_path / "shards"))
    assert load_held_out(make_packer([alone], "heldout"), make_packer([alone], "train"), 20, 4) is None


SCRIPT = """
import json, os, sys
import deepspeed, torch
import torch.distributed as dist
sys.path.insert(0, os.path.dirname({test_file!r}))
from test_evaluations import TASKS, make_model, make_packer
from quincunx.data_shards.shards import open_shards
from quincunx.data_shards.tokenizer import load_tokenizer
from quincunx.engine.evaluations import load_held_out, run_held_out
from quincunx.engine.evaluations import load_probe, run_probe


torch.set_num_threads(1)
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.init_distributed("gloo")
shards = open_shards({shards!r})
model = make_model(shards.manifest.vocab_size)
config = {{
    "train_micro_batch_size_per_gpu": 1,
    "optimizer": {{"type": "AdamW", "params": {{"lr": 1e-3, "torch_adam": True}}}},
    "zero_optimization": {{"stage": 3, "stage3_param_persistence_threshold": 0}},
}}
engine, *_ = deepspeed.initialize(model=model, config=config, model_parameters=model.parameters())
held_out = load_held_out(make_packer([shards], "heldout"), make_packer([shards], "train"), 20, 4)  # 5 batches, 2 ranks
probe = load_probe({beir!r}, load_tokenizer(shards.tokenizer_folder), 40)
import quincunx.engine.evaluations as module
object.__setattr__(probe, "batches", module.batches_by_length(probe.texts, 150))
assert len(held_out.batches) % 2 == 1 and len(probe.batches) % 2 == 1, (len(held_out.batches), len(probe.batches))
metrics = run_held_out(model, held_out, torch.device("cpu")) | run_probe(model, probe, torch.device("cpu"))
with open({output!r} + str(dist.get_rank()), "w") as file:
    json.dump(metrics, file)
dist.barrier()
dist.destroy_process_group()
"""


def test_two_ranks_under_zero_3_agree_with_one_process_with_uneven_shares(shards, small_shards, beir_folder, tmp_path):
    script = tmp_path / "script.py"
    output = str(tmp_path / "metrics-")
    script.write_text(SCRIPT.format(test_file=__file__, shards=str(small_shards), beir=str(beir_folder), output=output))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    ranks = [json.loads(Path(f"{output}{rank}").read_text()) for rank in (0, 1)]
    assert ranks[0] == ranks[1]

    model = make_model(shards.manifest.vocab_size)
    held_out = load_held_out(make_packer([shards], "heldout"), make_packer([shards], "train"), 20, 20)
    probe = load_probe(beir_folder, load_tokenizer(shards.tokenizer_folder), 40)
    alone = run_held_out(model, held_out, CPU) | run_probe(model, probe, CPU)
    # Other batches, other order of float32 sums.
    assert ranks[0] == {name: pytest.approx(value, rel=1e-5) for name, value in alone.items()}


@pytest.mark.gpu
def test_on_a_card_the_held_out_losses_are_those_of_the_cpu(shards):
    """Tolerance: float32 products in another order."""
    batches = load_held_out(make_packer([shards], "heldout"), make_packer([shards], "train"), 20, 3)
    model = make_model(shards.manifest.vocab_size)
    alone = run_held_out(model, batches, CPU)
    on_card = run_held_out(model.to("cuda"), batches, torch.device("cuda"))
    assert on_card == pytest.approx(alone, rel=1e-4)
