"""The whole model: the loss of a global batch, however it is cut, and every part's share in it."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from quincunx.data_shards.batches import Batch, Context, Task, make_labels, make_text, to_device
from quincunx.data_shards.errors import CheckpointError, SettingsError
from quincunx.data_shards.tasks import TASKS as TASKS_OF_PACKER
from quincunx.data_shards.tasks import TaskSpec
from quincunx.engine.export import write_bundle
from quincunx.engine.model import SENTENCE_LOSSES, PretrainModel, build_model, load_bundle
from quincunx.engine.training import parameter_groups

TASKS = ("mkp", "cmp", "npr", "dor")
NAMES = ("mlm", *TASKS)
VOCAB = 99


def make_model(family="bert", decoder="enhanced", tasks=TASKS, **changes) -> PretrainModel:
    torch.manual_seed(0)
    arguments = {
        "max_tokens": 40,
        "dropout": 0.0,
        "from_scratch": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 40,
        },
        "vocab_size": VOCAB,
        "pad_token_id": 0,
    }
    specs = [TaskSpec(name=name, decoder=decoder, weight=1 + i / 4) for i, name in enumerate(tasks)]
    return build_model(family, specs, **{**arguments, **changes})


def make_passages(count: int, decoder: str, seed: int = 0) -> list[dict]:
    """`count` passages, each with its texts: npr misses every third and the tenth on, dor all but the first two."""
    rng = np.random.default_rng(seed)
    passages = []
    for i in range(count):
        length = int(rng.integers(3, 40))
        passages.append({"encoder": make_task(rng, length, "masked", 0.3)})
        for name in TASKS:
            if (name == "npr" and (i % 3 == 2 or i > 8)) or (name == "dor" and i > 1):
                continue
            passages[-1][name] = make_task(rng, length if name in ("mkp", "cmp") else int(rng.integers(3, 40)), decoder)
            if name == "cmp" and decoder == "enhanced":
                passages[-1]["cmp"]["ids"] = passages[-1]["mkp"]["ids"]
    return passages


def make_task(rng: np.random.Generator, length: int, decoder: str, rate: float = 0.5) -> dict:
    labelled = np.ones(length, bool) if decoder == "enhanced" else rng.random(length) < rate
    labelled[[0, -1]] = False
    thresholds = np.full(length, 2**29, np.int32)
    thresholds[[0, -1]] = 2**30
    return {
        "ids": rng.integers(5, VOCAB, length).astype(np.int32),
        "positions": np.flatnonzero(labelled),
        "labels": rng.integers(5, VOCAB, int(labelled.sum())).astype(np.int32),
        "key": np.int32(rng.integers(-(2**31), 2**31)),
        "words": np.arange(length, dtype=np.int32),
        "thresholds": thresholds,
    }


def pack(passages: list[dict], decoder: str) -> Batch:
    contexts, tasks = {}, {}

    def add(name: str, kind: str) -> None:
        owners = [i for i, passage in enumerate(passages) if name in passage]
        texts = [passages[i][name] for i in owners]
        cu_seqlens = np.cumsum([0, *(len(text["ids"]) for text in texts)])

        def joined(parts) -> np.ndarray:
            return np.concatenate([np.zeros(0, np.int32), *parts]).astype(np.int32)

        positions = joined(text["positions"] + start for text, start in zip(texts, cu_seqlens))
        labels = make_labels(positions, joined(text["labels"] for text in texts))
        rule, context = {}, name
        if kind == "enhanced":
            context = TASKS_OF_PACKER[name].field
            rule["keys"] = torch.tensor([text["key"] for text in texts], dtype=torch.int32)
            rule["word_ids"] = torch.from_numpy(joined(text["words"] for text in texts))
            rule["keep_thresholds"] = torch.from_numpy(joined(text["thresholds"] for text in texts))
        if context not in contexts:
            text = make_text(joined(text["ids"] for text in texts), cu_seqlens)
            contexts[context] = Context(text, torch.tensor(owners, dtype=torch.int64))
        tasks[name] = Task(context, labels, **rule)

    add("encoder", "masked")
    encoder, labels = contexts.pop("encoder").text, tasks.pop("encoder").labels
    for name in TASKS:
        add(name, decoder)
    return Batch(encoder, labels, contexts, tasks)


def run(model, passages, decoder, micro_batch):
    """Loss, per-task sums and gradients of one global batch in micro-batches."""
    model.zero_grad()
    batches = [pack(passages[i : i + micro_batch], decoder) for i in range(0, len(passages), micro_batch)]
    counts = torch.tensor([batch.num_labels() for batch in batches]).sum(0)
    device = model.lambdas.device
    loss, sums, correct, seen = 0.0, 0.0, 0, 0
    for batch in batches:
        output = model(to_device(batch, device), counts.to(device))
        output.loss.backward()
        loss, sums = loss + output.loss.detach().double(), sums + output.nll_sums.double()
        correct, seen = correct + output.correct, seen + output.counts
    assert torch.equal(seen, counts)
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return loss, sums, correct, counts, gradients


@pytest.mark.parametrize("decoder", ["masked", "enhanced"])
def test_one_batch_of_32_equals_four_of_8_in_loss_and_gradients(decoder):
    """Some micro-batches hold no dor text at all. Tolerance: float32 sums in another order."""
    model, passages = make_model(decoder=decoder), make_passages(32, decoder)
    assert "dor" not in [name for passage in passages[8:] for name in passage]
    loss, sums, correct, counts, whole = run(model, passages, decoder, 32)
    loss_of_parts, sums_of_parts, correct_of_parts, _, parts = run(model, passages, decoder, 8)
    torch.testing.assert_close(loss_of_parts, loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(sums_of_parts, sums, rtol=1e-6, atol=0)
    assert torch.equal(correct_of_parts, correct)
    lambdas = torch.tensor([1.0, 1.0, 1.25, 1.5, 1.75], dtype=torch.float64)
    torch.testing.assert_close(loss, (lambdas * sums / counts).sum(), rtol=1e-6, atol=0)
    largest = max(gradient.norm() for gradient in whole.values())
    for name, gradient in whole.items():
        assert (parts[name] - gradient).norm() <= 1e-6 * largest, name


@pytest.mark.gpu
@pytest.mark.parametrize("decoder", ["masked", "enhanced"])
def test_on_a_card_a_step_is_that_of_the_cpu(decoder):
    """Float32 to rounding, and bf16 near it; the last micro-batch has no dor text, one sequence has no label."""
    passages = make_passages(12, decoder)
    passages[8]["mkp"] |= {"positions": np.zeros(0, int), "labels": np.zeros(0, np.int32)}
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 40}
    cpu = run(make_model(decoder=decoder, from_scratch=shape), passages, decoder, 4)
    for dtype, tolerance in ((torch.float32, 1e-3), (torch.bfloat16, 0.1)):
        model = make_model(decoder=decoder, from_scratch=shape).to("cuda", dtype)
        card = run(model, passages, decoder, 4)
        torch.testing.assert_close(card[0].cpu(), cpu[0], rtol=tolerance, atol=0)
        flat, reference = (
            torch.cat([gradients[name].cpu().double().flatten() for name in cpu[4]]) for gradients in (card[4], cpu[4])
        )
        assert (flat - reference).norm() <= tolerance * reference.norm()


@pytest.mark.parametrize("family", ["bert", "roberta", "electra", "modernbert"])
@pytest.mark.parametrize(
    ("decoder", "query_stream"), [("masked", "raw"), ("enhanced", "raw"), ("enhanced", "embedded")]
)
def test_every_parameter_has_a_gradient_even_where_a_task_has_no_rows(family, decoder, query_stream):
    model = make_model(family, decoder, query_stream=query_stream)
    passages = make_passages(3, decoder)
    _, sums, _, counts, gradients = run(model, passages[2:], decoder, 1)
    assert counts[NAMES.index("npr")] == counts[NAMES.index("dor")] == 0
    assert torch.isfinite(sums).all() and sums[counts == 0].sum() == 0
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
    assert all((gradient == 0).all() for name, gradient in gradients.items() if name.startswith("decoders.dor"))
    assert any(gradient.abs().sum() > 0 for name, gradient in gradients.items() if name.startswith("decoders.mkp"))
    encoder_alone = [{"encoder": passage["encoder"]} for passage in passages]
    _, _, _, counts, gradients = run(model, encoder_alone, decoder, 3)
    assert counts[1:].sum() == 0
    assert all((gradient == 0).all() for name, gradient in gradients.items() if name.startswith("decoders."))


def test_a_sentence_loss_is_one_entry(monkeypatch):
    """The mean over all passages of the global batch, whatever the micro-batch; its gradient reaches the encoder."""
    monkeypatch.setitem(SENTENCE_LOSSES, "first", lambda h_BD, batch, encode: h_BD[:, 0])
    passages = make_passages(6, "enhanced")
    model, plain = make_model(sentence_losses={"first": 0.5}), make_model()
    vectors = plain.encode(pack(passages, "enhanced").encoder)
    for micro_batch in (6, 2):
        model.zero_grad()
        batches = [pack(passages[i : i + micro_batch], "enhanced") for i in range(0, 6, micro_batch)]
        counts = torch.tensor([model.loss_counts(batch) for batch in batches]).sum(0)
        outputs = [model(batch, counts) for batch in batches]
        loss = sum(output.loss for output in outputs)
        loss.backward()
        expected = run(plain, passages, "enhanced", 6)[0] + 0.5 * vectors[:, 0].mean()
        torch.testing.assert_close(loss.double(), expected.double(), rtol=1e-5, atol=0)
        assert counts[-1] == 6 and sum(output.correct[-1] for output in outputs) == 0
    ours, theirs = (m.encoder.model.encoder.layer[0].output.dense.weight.grad for m in (model, plain))
    assert not torch.allclose(ours, theirs)


def test_a_sequence_does_not_depend_on_the_others_of_its_batch():
    model, passages = make_model(), make_passages(4, "enhanced")
    alone = [run(model, [passage], "enhanced", 1)[1] for passage in passages]
    torch.testing.assert_close(sum(alone), run(model, passages, "enhanced", 4)[1], rtol=1e-6, atol=1e-6)


def test_decoders_can_start_as_the_encoders_last_layers():
    model = make_model(decoder="masked", decoder_init="encoder")
    ours, theirs = model.decoders["npr"].layers, model.encoder.model.encoder.layer
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine.query.weight, other.attention.self.query.weight)
        assert torch.equal(mine.key_value.weight.chunk(2)[1], other.attention.self.value.weight)
    with pytest.raises(SettingsError, match="BERT-like"):
        make_model("modernbert", decoder="masked", decoder_init="encoder")


@pytest.mark.parametrize(
    ("decoder", "query_stream"), [("masked", "raw"), ("enhanced", "raw"), ("enhanced", "embedded")]
)
def test_a_shared_decoder_gets_the_sum_of_the_gradients_that_equal_decoders_of_the_tasks_get(decoder, query_stream):
    """Tolerance: float32 sums in another order."""
    shared = make_model(decoder=decoder, query_stream=query_stream, shared_decoder=True)
    apart = make_model(decoder=decoder, query_stream=query_stream)
    state = shared.state_dict()
    copies = {f"decoders.{task}.{name}": value for task in TASKS for name, value in decoder_state(state).items()}
    apart.load_state_dict({name: value for name, value in state.items() if "decoders." not in name} | copies)
    passages = make_passages(6, decoder)
    loss, sums, _, _, gradients = run(shared, passages, decoder, 3)
    loss_apart, sums_apart, _, _, gradients_apart = run(apart, passages, decoder, 3)
    torch.testing.assert_close(loss, loss_apart, rtol=1e-6, atol=0)
    torch.testing.assert_close(sums, sums_apart, rtol=1e-6, atol=0)
    largest = max(gradient.norm() for gradient in gradients.values())
    for name, gradient in gradients.items():
        same = [name] if "decoders." not in name else [name.replace(".shared.", f".{task}.") for task in TASKS]
        assert (sum(gradients_apart[each] for each in same) - gradient).norm() <= 1e-6 * largest, name


def decoder_state(state: dict) -> dict:
    prefix = "decoders.shared."
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


@pytest.mark.parametrize("decoder", ["masked", "enhanced"])
def test_a_shared_decoder_is_one_module_under_one_name(decoder):
    model = make_model(decoder=decoder, decoder_init="encoder", shared_decoder=True)
    assert list(model.decoders) == ["shared"]
    assert all(model.decoder_of(task) is model.decoders["shared"] for task in TASKS)
    assert {name.split(".")[1] for name in model.state_dict() if name.startswith("decoders.")} == {"shared"}
    last = model.encoder.model.encoder.layer[-1]
    assert torch.equal(model.decoder_of("npr").layers[-1].query.weight, last.attention.self.query.weight)
    grouped = [parameter for group in parameter_groups(model, 0.01) for parameter in group["params"]]
    assert len(grouped) == len({id(parameter) for parameter in grouped}) == len(list(model.parameters()))


def test_a_bundle_gives_a_shared_decoder_back_to_any_tasks(tmp_path):
    model = make_model(shared_decoder=True)
    outside = {name: value for name, value in model.state_dict().items() if not name.startswith("encoder.")}
    description = {"tasks": dict.fromkeys(TASKS, "enhanced"), "shared_decoder": True}
    write_bundle(tmp_path, outside, description)
    for tasks in (TASKS, ("gor", "mkp")):
        other = make_model(tasks=tasks, shared_decoder=True)
        for parameter in other.parameters():
            torch.nn.init.zeros_(parameter)
        load_bundle(other, tmp_path, lambda line: pytest.fail(line))
        loaded = other.state_dict()
        assert all(torch.equal(loaded[name], value) for name, value in outside.items())
    with pytest.raises(CheckpointError, match=r"one decoder for all tasks.*--shared_decoder,"):
        load_bundle(make_model(), tmp_path)
    with pytest.raises(CheckpointError, match="kind enhanced for mkp"):
        load_bundle(make_model(decoder="masked", decoder_layers=1, shared_decoder=True), tmp_path)
    write_bundle(tmp_path, outside, {"tasks": dict.fromkeys(TASKS, "enhanced")})  # as it was before there were any
    with pytest.raises(CheckpointError, match=r"one decoder for each task.*--no_shared_decoder,"):
        load_bundle(make_model(shared_decoder=True), tmp_path)
    said = []
    write_bundle(tmp_path, {name: value for name, value in outside.items() if "lm_head" in name}, {"tasks": {}})
    load_bundle(make_model(shared_decoder=True), tmp_path, said.append)  # of masked language modelling alone
    assert len(said) == 1 and "fresh" in said[0]


def test_the_output_weight_is_the_word_embedding():
    """No parameter of the head has its shape, so its gradient is the one that reaches the embedding."""
    model = make_model(tasks=())
    assert not any(parameter.shape == (VOCAB, 32) for parameter in model.lm_head.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("decoder", ["masked", "enhanced"])
def test_torch_compile_changes_nothing(decoder):
    """Tolerance: compiled float32 kernels round otherwise."""
    model, passages = make_model(decoder=decoder), make_passages(6, decoder)
    loss, sums, _, _, plain = run(model, passages, decoder, 3)
    model.compile_parts()
    compiled_loss, compiled_sums, _, _, compiled = run(model, passages, decoder, 3)
    torch.testing.assert_close(compiled_loss, loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(compiled_sums, sums, rtol=1e-5, atol=0)
    largest = max(gradient.norm() for gradient in plain.values())
    assert all((compiled[name] - plain[name]).norm() <= 1e-5 * largest for name in plain)


ZERO_RANK = """
import sys
import deepspeed
import torch
import torch.distributed as dist
sys.path.insert(0, {folder!r})
from test_model import TASKS, make_model, make_passages, pack
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

torch.set_num_threads(1)
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.init_distributed("gloo", verbose=False)
rank, decoder = dist.get_rank(), {decoder!r}
results = {{}}
for stage in (0, 1, 2, 3):
    model = make_model(decoder=decoder)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config={{
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
        "zero_optimization": {{"stage": stage, "stage3_param_persistence_threshold": 0}},
        "optimizer": {{"type": "AdamW", "params": {{"lr": 1e-3, "eps": 1e-3, "torch_adam": True}}}},
    }})
    losses, gradients = [], {{}}
    for step in range(3):
        passages = make_passages(12, decoder, seed=step)
        batches = [pack(passages[i : i + 3], decoder) for i in range(0, 12, 3)]
        counts = torch.tensor([batch.num_labels() for batch in batches]).sum(0)
        total = torch.zeros(())
        for turn in range(2):
            output = engine(batches[2 * rank + turn], counts)
            engine.backward(output.loss * 4)  # DeepSpeed means over 2 ranks and 2 micro-batches, the loss is a sum
            if step == 0 and turn == 1:
                gradients = {{name: safe_get_full_grad(p).double() for name, p in model.named_parameters()}}
            engine.step()
            total += output.loss.detach()
        dist.all_reduce(total)
        losses.append(total.item())
    weights = {{name: safe_get_full_fp32_param(p) if stage else p.detach() for name, p in model.named_parameters()}}
    results[stage] = (losses, gradients, {{name: value.double().clone() for name, value in weights.items()}})
    engine.destroy()
if rank == 0:
    torch.save(results, {output!r})
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.parametrize("decoder", [pytest.param("masked", marks=pytest.mark.slow), "enhanced"])
def test_zero_0_1_2_and_3_train_alike_with_the_tied_weight(decoder, tmp_path):
    """Two ranks, one without dor rows and at last without npr's; also against the whole batch in one process."""
    script, output = tmp_path / "rank.py", tmp_path / "results.pt"
    script.write_text(ZERO_RANK.format(folder=str(Path(__file__).parent), decoder=decoder, output=str(output)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert finished.returncode == 0, finished.stderr[-3000:]
    results = torch.load(output)
    loss, _, _, _, gradients = run(make_model(decoder=decoder), make_passages(12, decoder), decoder, 12)
    assert results[0][0][0] == pytest.approx(loss.item(), rel=1e-6)

    def distance(a, b):
        difference = sum((a[name] - b[name]).square().sum() for name in b)
        return float((difference / sum(b[name].square().sum() for name in b)).sqrt())

    for losses, own_gradients, weights in results.values():
        assert losses == pytest.approx(results[0][0], rel=1e-6)
        assert distance(own_gradients, {name: value.double() for name, value in gradients.items()}) < 1e-6
        assert distance(weights, results[0][2]) < 1e-6
