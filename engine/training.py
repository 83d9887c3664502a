"""A training run of any stage: start, the loop, the end.

DeepSpeed owns accumulation, clipping, ZeRO and precision. What DeepSpeed does not do stands inline in `train`: the
label counts that make each loss a mean over the global batch, the learning rate, dropout's seed, skipped steps, and
stopping on request. What differs between stages (model, data, losses, evaluations) is the stage's `Job`, below:
engine/pretraining.py has pre-training's, engine/retrieval/retriever_job.py and reranker_job.py those of fine-tuning.
"""

import difflib
import hashlib
import json
import os
import shlex
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
import yaml

from quincunx.data_shards.errors import EXIT_DIVERGED, EXIT_PREEMPTED, CheckpointError, DataError, SettingsError
from quincunx.data_shards.hashing import fold, mix
from quincunx.data_shards.setting import as_plain, local_names
from quincunx.data_shards.stream import Stream
from quincunx.engine.checkpoint import (
    Checkpoint,
    choose_checkpoint,
    load_checkpoint,
    remove_leftovers,
    save_checkpoint,
)
from quincunx.engine.ranks import Environment, StopRequest, Watchdog
from quincunx.engine.run_folder import METRICS_FILE, RunFolder, Tracker
from quincunx.engine.settings import Machine, RunSettings, precision_of
from quincunx.engine.throughput import Progress, Window, peak_flops_of


class Evaluation(NamedTuple):
    """What is measured before the first step, every so many steps, and after the last. Every rank takes part."""

    kind: str
    """Kind of its records in metrics.jsonl: "held_out" or "probe"."""
    every: int
    """Steps between two measurements."""
    measure: Callable[[torch.device], dict[str, float]]
    shown: bool
    """Whether its numbers are printed."""


class Job(Protocol):
    """What a stage brings to the run, on each rank; made before the process group starts."""

    settings: RunSettings
    machine: Machine
    model: torch.nn.Module
    """Its loss_counts(batch) says what each loss is a mean over (labelled tokens, queries), its compile_parts() runs
    torch.compile on the parts that gain by it."""
    stream: Stream
    """The rank's micro-batches step by step. A batch has num_passages, num_tokens and num_cut_texts."""
    data: dict[str, list]
    """What a checkpoint must agree on: dataset_ids, digests of all that is trained on, and dataset_weights."""
    loss_weights: dict[str, float]
    """Weight of each loss by its name, in the order of loss_counts and of a StepOutput's sums."""
    evaluations: list[Evaluation]

    def forward_passes(
        self, engine: Any, batches: list, label_counts: torch.Tensor, seeds: list[int]
    ) -> Iterator["StepOutput"]:
        """The step's micro-batches through the engine, one output each, in order; the loop runs backward on each.

        label_counts: loss_counts of the global batch, float32 on the device; a loss is this rank's share of the mean.
        seeds: torch's seed for each forward's dropout.
        """

    def write_model_files(self, folder: Path) -> None:
        """Keeps in `folder` what an export needs beside the weights (launchers/export.py). Rank 0 only."""


class StepOutput(NamedTuple):
    """What a job's forward pass gives; pre-training's says more (engine/model.py)."""

    loss: torch.Tensor
    """Scalar: this micro-batch's share of the weighted sum of losses, each a mean over the global batch."""
    nll_sums: torch.Tensor
    """[losses], sums of each loss over what loss_counts counts, detached."""
    correct: torch.Tensor
    """[losses], how many of them the model got right."""
    flops: float
    """FLOPs of forward and backward, matrix products only, for mfu; recomputation does not count."""


def run_training(prepare: Callable[[], Job], environment: Environment) -> int:
    """Runs or resumes a training on this rank; returns the process's exit code.

    prepare: makes the job; it is called once signals are watched.
    0 done, 75 stopped on request after a checkpoint, 77 diverged (76 comes from the watchdog). Raises SettingsError,
    DataError, CheckpointError; a SettingsError comes before the first step.
    """
    stop_request = StopRequest(launched=environment.launcher != "python")
    run, status = None, "failed"
    try:
        run = Run(prepare(), environment, stop_request)
        code = run.train()
        status = {EXIT_PREEMPTED: "preempted", EXIT_DIVERGED: "diverged"}.get(code, "finished")
        return run.finish(code)
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    finally:
        if run is not None:
            run.close(status)
        # gloo's threads may abort a process at its end, and its exit code is lost; NCCL would wait for failed ranks.
        if dist.is_initialized() and dist.get_backend() == "gloo":
            dist.destroy_process_group()


class Run:
    """A run in progress on one rank.

    step: optimizer steps done, skipped ones included. skipped_steps: those whose loss or gradient was not finite.
    bad_steps: the last ones of them in a row. control: a gloo process group, so that what the host must know each step
    never waits for a GPU. tracker: the run's record, on rank 0; None on the others.
    """

    def __init__(self, job: Job, environment: Environment, stop_request: StopRequest):
        """Chooses what to resume (rank 0), meets the other ranks, starts DeepSpeed's engine and loads it."""
        self.job, self.environment, self.stop_request = job, environment, stop_request
        self.settings = settings = job.settings
        self.folder = RunFolder(settings.output, environment.is_main)
        self.identity = {**job.data, "model_digest": digest_of(job.model)}
        self.total_steps = settings.total_steps(sum(job.stream.order.num_samples))
        checkpoint = None
        if environment.is_main:
            checkpoint = choose_checkpoint(job, self.identity, self.total_steps, self.folder, environment.world_size)
            self.folder.settings_file.write_text(yaml.safe_dump(as_plain(settings), sort_keys=False))
            job.write_model_files(self.folder.model)
        self.control, checkpoint = meet(job, environment, self.identity, checkpoint)

        import deepspeed

        self.device = torch.device("cuda", environment.local_rank) if job.machine.cuda else torch.device("cpu")
        config = job.machine.config
        if checkpoint is not None and checkpoint.converted is not None:
            config = {**config, "checkpoint": {**(config.get("checkpoint") or {}), "load_universal": True}}
        parameters = parameter_groups(job.model, settings.weight_decay)
        self.engine, *_ = deepspeed.initialize(model=job.model, model_parameters=parameters, config=config)
        state = {"step": 0, "skipped_steps": 0, "bad_steps": 0}
        if checkpoint is not None:
            load_checkpoint(self.engine, checkpoint.converted or checkpoint.folder)
            state = checkpoint.state
        self.step, self.skipped_steps, self.bad_steps = state["step"], state["skipped_steps"], state["bad_steps"]
        if settings.compile:
            job.model.compile_parts()
        dist.barrier(group=self.control)

        self.tracker = None
        self.progress = Progress(self.step, self.total_steps, environment.is_main)
        if environment.is_main:
            remove_leftovers(self.folder.checkpoints)
            self.tracker = Tracker(self.folder.path, settings.tracking, self.step)
            self.announce(checkpoint)
        self.watchdog = Watchdog(settings.hang_minutes * 60, on_hang=lambda: self.end_record("hung"))

    def train(self) -> int:
        """The loop, from self.step to the last step; returns 0, 75 or 77."""
        job, settings, engine, rank = self.job, self.settings, self.engine, self.environment.rank
        world_size, precision = self.environment.world_size, precision_of(job.machine.config)
        window = Window(job, self.device, peak_flops_of(self.device, world_size, precision))
        if self.step == 0:
            self.evaluate()
        if self.total_steps == 0:
            self.save(ending=True)

        steps = job.stream.iterate(self.step)
        while self.step < self.total_steps:
            # What all ranks must agree on: labelled tokens of the global batch, and whether any rank is asked to stop.
            batches, label_counts, stop = self.agree(steps)

            rate = learning_rate_at(self.step, self.total_steps, settings.learning_rate, settings.warmup_share)
            for group in engine.optimizer.param_groups:
                group["lr"] = rate

            # Dropout's seeds: a resumed run at the same number of ranks draws the same.
            key = fold(mix(settings.seed), self.step)
            seeds = [int(fold(fold(key, micro_step), rank)) for micro_step in range(len(batches))]
            # DeepSpeed averages gradients over ranks; the losses are shares of one mean, so theirs must be summed.
            outputs = []
            for output in job.forward_passes(engine, batches, label_counts, seeds):
                engine.backward(output.loss * world_size, scale_wrt_gas=False)
                engine.step()
                outputs.append(output._replace(loss=output.loss.detach()))

            self.step += 1
            if engine.was_step_applied():
                self.bad_steps = 0
                window.add(batches, outputs)
            else:
                self.skipped_steps += 1
                self.bad_steps += 1
                self.note_skipped_step()
            self.watchdog.beat()
            self.progress.step()

            diverged, last = self.bad_steps >= settings.max_bad_steps, self.step == self.total_steps
            ending = diverged or stop or last
            if ending or self.step % settings.log_every == 0:
                self.log(window, rate)
            if diverged:
                self.progress.say(f"stopped: {self.bad_steps} steps in a row had a loss or gradient that is not finite")
                return EXIT_DIVERGED
            self.evaluate(last)
            if ending or self.step % settings.checkpoint_every == 0:
                self.save(ending)
            if stop and not last:
                self.progress.say(f"stopped at step {self.step} on request; the same command continues")
                return EXIT_PREEMPTED
        return 0

    def agree(self, steps: Iterator[list]) -> tuple[list, torch.Tensor, bool]:
        """(this rank's micro-batches, the global batch's loss counts, whether any rank is asked to stop).

        Loss counts, float32 on the device, are what each loss is a mean over. Raises DataError on every rank if the
        data of one of them is damaged.
        """
        batches, failure = [], ""
        try:
            batches = next(steps)
        except DataError as error:
            failure = str(error)
        mine = torch.zeros(len(self.job.loss_weights) + 2, dtype=torch.float64)
        for batch in batches:
            mine[:-2] += torch.tensor(self.job.model.loss_counts(batch), dtype=torch.float64)
        mine[-2], mine[-1] = self.stop_request.pending(), bool(failure)
        dist.all_reduce(mine, group=self.control)
        if mine[-1] > 0:
            told = [""] * self.environment.world_size
            dist.all_gather_object(told, failure, group=self.control)
            raise DataError(next(f"on rank {rank}: {sentence}" for rank, sentence in enumerate(told) if sentence))
        return batches, mine[:-2].to(self.device, torch.float32), bool(mine[-2] > 0)

    def note_skipped_step(self) -> None:
        """Writes down a step whose loss or gradient was not finite on some rank, with all its sample ids. Rank 0."""
        if self.tracker is None:
            return
        stream = self.job.stream
        rows = stream.order.global_batch(self.step - 1, stream.global_batch)
        self.record("event", {"event": "skipped_step", "in_a_row": self.bad_steps})
        self.progress.say(f"step {self.step} skipped: its loss or gradient is not finite ({self.bad_steps} in a row)")
        try:
            with open(self.folder.skipped_file, "a") as file:
                file.write(json.dumps({"step": self.step, **stream.packer.names(rows)}) + "\n")
        except OSError as error:
            self.progress.say(f"the skipped step's sample ids could not be written down: {error}")

    def log(self, window: Window, rate: float) -> None:
        """One line of training metrics, means since the last one."""
        metrics = window.metrics()
        metrics["learning_rate"] = rate
        metrics["grad_norm"] = float(self.engine.get_global_grad_norm())
        metrics["skipped_steps"] = self.skipped_steps
        self.record("train", metrics)
        if self.environment.is_main:
            self.progress.log(self.step, metrics)

    def evaluate(self, last: bool = False) -> None:
        """The job's evaluations that are due: before the first step, every so many, after the last."""
        for kind, every, measure, shown in self.job.evaluations:
            if last or self.step % every == 0:
                metrics = measure(self.device)
                self.record(kind, metrics)
                if shown:
                    values = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
                    self.progress.say(f"step {self.step}  {values}")
                self.watchdog.beat()

    def save(self, ending: bool) -> None:
        """Commits a checkpoint of this step; a failure is said and recorded, and training goes on.

        Raises CheckpointError, on every rank, if it was the run's last chance (`ending`).
        """
        state = {  # beside weights and moments; the step says where the run stands in the data
            "step": self.step,
            "skipped_steps": self.skipped_steps,
            "bad_steps": self.bad_steps,
            **self.identity,
            "settings": as_plain(self.settings),
        }
        keep = self.settings.keep_checkpoints
        failure = save_checkpoint(self.engine, self.control, self.folder.checkpoints, self.step, state, keep)
        if failure is not None:
            self.record("event", {"event": "checkpoint_failed", "reason": failure})
            if ending:
                raise CheckpointError(
                    f"the checkpoint of the last step, {self.step}, could not be saved ({failure}); free space "
                    "and run the same command, which continues from the newest one that was saved"
                )
            lost = f"CHECKPOINT OF STEP {self.step} COULD NOT BE SAVED ({failure})"
            self.progress.say(f"{lost}; training continues without it")
        self.watchdog.beat()

    def announce(self, checkpoint: Checkpoint | None) -> None:
        """Says what is about to run, and records it."""
        settings, world_size, micro_batch = self.settings, self.environment.world_size, self.job.machine.micro_batch
        for sentence in misspelt_keys(self.job.machine.config):
            self.progress.say(f"warning: {sentence}")
        parameters = sum(getattr(p, "ds_numel", p.numel()) for p in self.job.model.parameters())
        self.progress.say(
            f"{parameters / 1e6:.1f} M parameters; {settings.global_batch} examples a step = "
            f"{world_size} ranks x {micro_batch} x {settings.global_batch // (micro_batch * world_size)}"
        )
        self.progress.say(f"watch it with: tail -f {shlex.quote(str(self.folder.path / METRICS_FILE))}")
        event = {"event": "started", "world_size": world_size, "total_steps": self.total_steps}
        if checkpoint is not None:
            universal = checkpoint.converted is not None
            event |= {"event": "resumed", "checkpoint": checkpoint.folder.name, "universal": universal}
            self.progress.say(f"resuming at step {self.step} of {self.total_steps} from {checkpoint.folder}")
        self.record("event", event)
        self.tracker.artifact(self.folder.settings_file)

    def record(self, kind: str, values: dict[str, Any]) -> None:
        """One line of metrics.jsonl (engine/run_folder.py), from rank 0."""
        if self.tracker is not None:
            self.tracker.log(self.step, kind, values)

    def finish(self, code: int) -> int:
        """Leaves the process group together with the other ranks; rank 0 then has a finished run exported.

        The export is a process of its own, the same command as a user's. Returns the exit code.
        """
        dist.barrier(group=self.control)
        dist.destroy_process_group()
        if code == 0 and self.environment.is_main and self.settings.export:
            self.watchdog.close()
            export = [sys.executable, "-m", "quincunx.launchers.export", "--run", str(self.folder.path)]
            code = subprocess.run(export).returncode
            cards = sorted(self.folder.export.glob("*/README.md"))
            for path in [*cards[:1], *self.folder.export.glob("*.png")]:
                self.tracker.artifact(path)
        return code

    def end_record(self, status: str) -> None:
        if self.tracker is not None:
            self.tracker.close(status)

    def close(self, status: str) -> None:
        """Ends what runs beside the loop; a run's `status` is what run_folder.py lists."""
        self.progress.close()
        self.end_record(status)
        self.watchdog.close()


def digest_of(model: torch.nn.Module) -> str:
    """16 hex digits of the names and shapes of a model's parameters, before DeepSpeed partitions them."""
    shapes = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    return hashlib.sha256(repr(shapes).encode()).hexdigest()[:16]


def meet(
    job: Job, environment: Environment, identity: dict[str, Any], checkpoint: Checkpoint | None
) -> tuple[Any, Checkpoint | None]:
    """Starts the process group; (a gloo group of all ranks, the checkpoint that rank 0 chose).

    Raises SettingsError if the ranks cannot meet, or if one has other data, another model or other settings than rank
    0. Paths and sizes of a machine's own may differ.
    """
    settings, config, cuda = job.settings, job.machine.config, job.machine.cuda
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # asked for, so that DeepSpeed need not warn
    # DeepSpeed calls collectives by the names torch renamed; a user of ours can do nothing about it.
    warnings.filterwarnings("ignore", category=FutureWarning, message=r".*torch\.distributed.*deprecated")
    import deepspeed

    environment.export()
    deepspeed.utils.logger.setLevel("WARNING")
    # A shared-memory reduction for inference, which DeepSpeed would compile for a minute and training never calls.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if cuda:
        torch.cuda.set_device(environment.local_rank)
    patience = timedelta(minutes=settings.hang_minutes + 5)  # the watchdog is first: it says what hangs
    try:
        deepspeed.init_distributed(
            "nccl" if cuda else "gloo", auto_mpi_discovery=False, verbose=False, timeout=patience
        )
    except dist.DistNetworkError as error:
        raise SettingsError(
            f"rank {environment.rank} cannot meet the others at {environment.master_addr}:{environment.master_port} "
            f"({str(error).splitlines()[0].rstrip('.')}); if another run has that port, give this one its own: "
            "deepspeed --master_port N, torchrun --master-port N, or MASTER_PORT=N"
        ) from None
    control = dist.new_group(backend="gloo", timeout=patience)

    common = {name: value for name, value in as_plain(settings).items() if name not in local_names(settings)}
    common |= {"config": config, "micro_batch": job.machine.micro_batch}
    common["evaluations"] = [evaluation.kind for evaluation in job.evaluations]
    digest = hashlib.sha256(json.dumps(common, sort_keys=True).encode()).hexdigest()[:16]
    mine = f"dataset {', '.join(job.data['dataset_ids'])}, model {identity['model_digest']}, settings {digest}"
    told: list[Any] = [None] * environment.world_size
    dist.all_gather_object(told, (checkpoint, mine), group=control)
    checkpoint, expected = told[0]
    for rank, (_, found) in enumerate(told):
        if found != expected:
            raise SettingsError(
                f"not all ranks have the same files and settings: rank {rank} has {found}, rank 0 {expected}; give all "
                "machines the same command and the same files"
            )
    return control, checkpoint


def misspelt_keys(config: dict[str, Any]) -> list[str]:
    """Keys of the DeepSpeed JSON that DeepSpeed ignores and that look like one it reads, as sentences."""
    from deepspeed.runtime import constants

    known = {value for value in vars(constants).values() if isinstance(value, str)}
    nearest = {key: difflib.get_close_matches(key, known, 1, cutoff=0.85) for key in config if key not in known}
    return [f"the DeepSpeed JSON has {key}; did you mean {near[0]}?" for key, near in nearest.items() if near]


def learning_rate_at(step: int, total_steps: int, peak: float, warmup_share: float) -> float:
    """Learning rate of optimizer step `step` (0-based): linear from near 0 to `peak`, then linear towards 0.

    Step 0 already learns (rate peak / warm-up steps) and so does the last one. A pure function, so that a resumed run
    needs no scheduler state.
    """
    warmup = round(total_steps * warmup_share)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * max(0, total_steps - step) / max(1, total_steps - warmup)


def parameter_groups(model, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups of a model's trainable parameters: matrices, which decay, and biases and norm scales, which do not."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    decaying = [parameter for _, parameter in named if parameter.ndim >= 2]
    others = [parameter for _, parameter in named if parameter.ndim < 2]
    return [
        {"params": decaying, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
