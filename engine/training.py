"""A training run of any stage: start, the loop, the end.

DeepSpeed owns accumulation, clipping, ZeRO and precision. What DeepSpeed does not do stands inline in `train`: the
label counts that make each loss a mean over the global batch, the learning rate, dropout's seed, skipped steps, and
stopping on request. What differs between stages (model, data, losses, evaluations) is the stage's `Job`, below:
engine/pretraining.py has pre-training's, engine/retrieval/retriever_job.py and reranker_job.py those of fine-tuning.
"""

import difflib
import fcntl
import hashlib
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist

from quincunx.data_shards.errors import EXIT_DIVERGED, EXIT_PREEMPTED, CheckpointError, DataError, SettingsError
from quincunx.data_shards.hashing import fold, mix
from quincunx.data_shards.setting import as_plain
from quincunx.data_shards.stream import Stream
from quincunx.engine.checkpoint import (
    Resume,
    choose_checkpoint,
    fingerprint,
    load_checkpoint,
    remove_leftovers,
    run_state,
    save_checkpoint,
)
from quincunx.engine.ranks import Environment, StopRequest, Watchdog
from quincunx.engine.run_folder import RunFolder, Tracker, open_tracker, view_command
from quincunx.engine.settings import Machine, RunSettings, lookup, precision_of
from quincunx.engine.throughput import Progress, Window, peak_flops_of


class Evaluation(NamedTuple):
    """What is measured before the first step, every so many steps, and after the last. Every rank takes part."""

    kind: str
    """Kind of its records in metrics.jsonl: "held_out", "probe" or "dev"."""
    every: int
    """Steps between two measurements; 0 never."""
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


class StepOutput(Protocol):
    """What a job's forward pass gives."""

    loss: torch.Tensor
    """Scalar: this micro-batch's share of the weighted sum of losses, each a mean over the global batch."""
    nll_sums: torch.Tensor
    """[losses], sums of each loss over what loss_counts counts, detached."""
    correct: torch.Tensor
    """[losses], how many of them the model got right."""
    flops: float
    """FLOPs of forward and backward, matrix products only, for mfu; recomputation does not count."""


@dataclass
class Run:
    """A run in progress on one rank."""

    job: Job
    environment: Environment
    folder: RunFolder
    engine: Any
    """The DeepSpeed engine around job.model."""
    model_digest: str
    device: torch.device
    total_steps: int
    peak_flops: float | None
    control: Any
    """A gloo process group: what the host must know each step never waits for a GPU."""
    tracker: Tracker
    progress: Progress
    watchdog: Watchdog
    stop_request: StopRequest
    step: int = 0
    """Optimizer steps done, skipped ones included."""
    skipped_steps: int = 0
    bad_steps: int = 0
    """Skipped steps in a row, up to now."""


def run_training(prepare: Callable[[], Job], settings: RunSettings, environment: Environment) -> int:
    """Runs or resumes a training on this rank; returns the process's exit code.

    prepare: makes the job; it is called once signals are watched.
    0 done, 75 stopped on request after a checkpoint, 77 diverged (76 comes from the watchdog). Raises SettingsError,
    DataError, CheckpointError; a SettingsError comes before the first step.
    """
    stop_request = StopRequest(launched=environment.launcher != "python")
    job = prepare()
    folder = RunFolder(settings.output, environment.is_main)
    model_digest = digest_of(job.model)
    total_steps = settings.total_steps(sum(job.stream.order.num_samples))
    resume = None
    if environment.is_main:
        resume = choose_checkpoint(job, model_digest, total_steps, folder, environment.world_size)
        folder.write_settings(as_plain(settings))
        job.write_model_files(folder.model)
    run, status = None, "failed"
    try:
        run = start(job, model_digest, total_steps, environment, folder, resume, stop_request)
        code = train(run)
        status = {EXIT_PREEMPTED: "preempted", EXIT_DIVERGED: "diverged"}.get(code, "finished")
        return finish(run, code)
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    finally:
        if run is not None:
            run.progress.close()
            run.tracker.close(status)
            run.watchdog.close()
        # gloo's threads may abort a process at its end, and its exit code is lost; NCCL would wait for failed ranks.
        if dist.is_initialized() and dist.get_backend() == "gloo":
            dist.destroy_process_group()


def digest_of(model: torch.nn.Module) -> str:
    """16 hex digits of the names and shapes of a model's parameters, before DeepSpeed partitions them."""
    shapes = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    return hashlib.sha256(repr(shapes).encode()).hexdigest()[:16]


def start(
    job: Job,
    model_digest: str,
    total_steps: int,
    environment: Environment,
    folder: RunFolder,
    resume: Resume | None,
    stop_request: StopRequest,
) -> Run:
    """Starts the process group and DeepSpeed's engine, and loads what rank 0 chose to resume from."""
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
    if lookup(config, "zero_optimization.offload_optimizer.device") == "cpu":
        compile_once(deepspeed.ops.op_builder.CPUAdamBuilder(), environment.is_main)
    device = torch.device("cuda", environment.local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    patience = timedelta(minutes=settings.hang_minutes + 5)  # the watchdog is first: it says what hangs
    backend = "nccl" if cuda else "gloo"
    try:
        deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False, timeout=patience)
    except dist.DistNetworkError as error:
        raise SettingsError(
            f"rank {environment.rank} cannot meet the others at {environment.master_addr}:{environment.master_port} "
            f"({str(error).splitlines()[0].rstrip('.')}); where another run has that port, give this one its own: "
            "deepspeed --master_port N, torchrun --master-port N, or MASTER_PORT=N"
        ) from None
    control = dist.new_group(backend="gloo", timeout=patience)
    told: list[Any] = [None] * environment.world_size
    dist.all_gather_object(told, (resume, fingerprint(job, model_digest)), group=control)
    resume, expected = told[0]
    for rank, (_, found) in enumerate(told):
        if found != expected:
            raise SettingsError(
                f"not all ranks have the same files and settings: rank {rank} has {found}, rank 0 {expected}; give all "
                "machines the same command and the same files"
            )

    if resume is not None and resume.universal:
        config = {**config, "checkpoint": {**config.get("checkpoint", {}), "load_universal": True}}
    parameters = parameter_groups(job.model, settings.weight_decay)
    engine, *_ = deepspeed.initialize(model=job.model, model_parameters=parameters, config=config)
    if resume is not None:
        load_checkpoint(engine, resume.folder)
    if settings.compile:
        job.model.compile_parts()
    dist.barrier(group=control)
    if environment.is_main:
        remove_leftovers(folder.checkpoints)

    state = resume.checkpoint.state if resume is not None else {"step": 0, "skipped_steps": 0, "bad_steps": 0}
    tracker = open_tracker(
        settings.tracking,
        folder.path,
        settings.run_name or folder.path.name,
        as_plain(settings),
        resume_run_id=state.get("run_id"),
        resume_step=state["step"],
        is_main=environment.is_main,
    )
    run = Run(
        job=job,
        environment=environment,
        folder=folder,
        engine=engine,
        model_digest=model_digest,
        device=device,
        peak_flops=peak_flops_of(device, environment.world_size, precision_of(config)),
        control=control,
        tracker=tracker,
        total_steps=total_steps,
        progress=Progress(state["step"], total_steps, environment.is_main),
        watchdog=Watchdog(settings.hang_minutes * 60, on_hang=lambda: tracker.close("hung")),
        stop_request=stop_request,
        step=state["step"],
        skipped_steps=state["skipped_steps"],
        bad_steps=state["bad_steps"],
    )
    announce(run, resume)
    return run


def compile_once(builder: Any, is_main: bool) -> None:
    """Compiles and loads a DeepSpeed operator; later calls on this machine only load it.

    torch marks a compilation with a file, which a killed process leaves behind and every later one waits for, without
    end. Here ranks and runs take turns by the kernel's lock (flock), which dies with its holder: whoever holds it knows
    that a mark still there is a dead process's, and removes it. For that the operators are compiled in a folder of
    ours, ~/.cache/quincunx/torch_extensions, unless TORCH_EXTENSIONS_DIR names another.

    builder: a DeepSpeed op builder (deepspeed.ops.op_builder). is_main: says on stderr that it takes a minute.
    """
    build = f"py{sys.version_info.major}{sys.version_info.minor}_torch{torch.__version__}"
    default = Path.home() / ".cache" / "quincunx" / "torch_extensions" / build
    folder = Path(os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(default)))
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "quincunx.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / builder.name / "lock").unlink(missing_ok=True)
        if is_main and not list((folder / builder.name).glob("*.so")):
            print(f"compiling DeepSpeed's {builder.name} (once, about a minute)", file=sys.stderr, flush=True)
        builder.load(verbose=False)


def misspelt_keys(config: dict[str, Any]) -> list[str]:
    """Keys of the DeepSpeed JSON that DeepSpeed ignores and that look like one it reads, as sentences."""
    from deepspeed.runtime import constants

    known = {value for value in vars(constants).values() if isinstance(value, str)}
    nearest = {key: difflib.get_close_matches(key, known, 1, cutoff=0.85) for key in config if key not in known}
    return [f"the DeepSpeed JSON has {key}; did you mean {near[0]}?" for key, near in nearest.items() if near]


def train(run: Run) -> int:
    """The loop, from run.step to the last step; returns 0, 75 or 77."""
    job, settings, engine = run.job, run.job.settings, run.engine
    world_size, rank = run.environment.world_size, run.environment.rank
    window = Window(job, run.device, run.peak_flops)
    if run.step == 0:
        evaluate(run)
    if run.total_steps == 0:
        save(run, ending=True)

    steps = job.stream.iterate(run.step)
    while run.step < run.total_steps:
        # What all ranks must agree on: labelled tokens of the global batch, and whether any rank is asked to stop.
        batches, failure = take(steps)
        label_counts, stop = agree(run, batches, failure)

        rate = learning_rate_at(run.step, run.total_steps, settings.learning_rate, settings.warmup_share)
        for group in engine.optimizer.param_groups:
            group["lr"] = rate

        # DeepSpeed averages gradients over ranks; the losses are shares of one mean, so their gradients must be summed.
        outputs = []
        seeds = [dropout_seed(settings.seed, run.step, micro_step, rank) for micro_step in range(len(batches))]
        for output in job.forward_passes(engine, batches, label_counts, seeds):
            engine.backward(output.loss * world_size, scale_wrt_gas=False)
            engine.step()
            outputs.append(output._replace(loss=output.loss.detach()))

        run.step += 1
        if engine.was_step_applied():
            run.bad_steps = 0
            window.add(batches, outputs)
        else:
            run.skipped_steps += 1
            run.bad_steps += 1
            note_skipped_step(run)
        run.watchdog.beat()
        run.progress.step()

        diverged, last = run.bad_steps >= settings.max_bad_steps, run.step == run.total_steps
        ending = diverged or stop or last
        if ending or run.step % settings.log_every == 0:
            log(run, window, rate)
        if diverged:
            run.progress.say(f"stopped: {run.bad_steps} steps in a row had a loss or gradient that is not finite")
            return EXIT_DIVERGED
        evaluate(run, last)
        if ending or run.step % settings.checkpoint_every == 0:
            save(run, ending)
        if stop and not last:
            run.progress.say(f"stopped at step {run.step} on request; the same command continues")
            return EXIT_PREEMPTED
    return 0


def take(steps: Iterator[list]) -> tuple[list, DataError | None]:
    """A step's micro-batches on this rank, or what is wrong with its data."""
    try:
        return next(steps), None
    except DataError as error:
        return [], error


def agree(run: Run, batches: list, failure: DataError | None) -> tuple[torch.Tensor, bool]:
    """(what each loss is a mean over in the global batch, float32 on the device; whether any rank is asked to stop).

    Raises DataError on every rank where one of them has no batches but a `failure`.
    """
    mine = torch.zeros(len(run.job.loss_weights) + 2, dtype=torch.float64)
    for batch in batches:
        mine[:-2] += torch.tensor(run.job.model.loss_counts(batch), dtype=torch.float64)
    mine[-2], mine[-1] = run.stop_request.pending(), failure is not None
    dist.all_reduce(mine, group=run.control)
    if mine[-1] > 0:
        told: list[Any] = [None] * run.environment.world_size
        dist.all_gather_object(told, failure and str(failure), group=run.control)
        raise DataError(next(f"on rank {rank}: {sentence}" for rank, sentence in enumerate(told) if sentence))
    return mine[:-2].to(run.device, torch.float32), bool(mine[-2] > 0)


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


def dropout_seed(seed: int, step: int, micro_step: int, rank: int) -> int:
    """Seed of one forward's dropout: a resumed run at the same number of ranks draws the same."""
    return int(fold(fold(fold(mix(seed), step), micro_step), rank))


def note_skipped_step(run: Run) -> None:
    """Writes down a step whose loss or gradient was not finite on some rank, with all its sample ids. Rank 0 only."""
    if not run.environment.is_main:
        return
    stream = run.job.stream
    rows = stream.order.global_batch(run.step - 1, stream.global_batch)
    record = {"step": run.step, **stream.packer.names(rows)}
    run.tracker.log(run.step, "event", {"event": "skipped_step", "in_a_row": run.bad_steps})
    run.progress.say(f"step {run.step} skipped: its loss or gradient is not finite ({run.bad_steps} in a row)")
    try:
        run.folder.note_skipped_step(record)
    except OSError as error:
        run.progress.say(f"the skipped step's sample ids could not be written down: {error}")


def log(run: Run, window: Window, rate: float) -> None:
    """One line of training metrics, means since the last one."""
    metrics = window.metrics()
    metrics["learning_rate"] = rate
    metrics["grad_norm"] = float(run.engine.get_global_grad_norm())
    metrics["skipped_steps"] = run.skipped_steps
    run.tracker.log(run.step, "train", metrics)
    if run.environment.is_main:
        run.progress.log(run.step, metrics)


def evaluate(run: Run, last: bool = False) -> None:
    """The job's evaluations where they are due: before the first step, every so many, after the last."""
    for kind, every, measure, shown in run.job.evaluations:
        if not every or not (last or run.step % every == 0):
            continue
        metrics = measure(run.device)
        run.tracker.log(run.step, kind, metrics)
        if shown:
            run.progress.say(f"step {run.step}  " + "  ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
        run.watchdog.beat()


def save(run: Run, ending: bool) -> None:
    """Commits a checkpoint of this step; a failure is said and recorded, and training goes on.

    Raises CheckpointError, on every rank, where it was the run's last chance (`ending`).
    """
    counters = {"step": run.step, "skipped_steps": run.skipped_steps, "bad_steps": run.bad_steps}
    run_id = [run.tracker.run_id]
    dist.broadcast_object_list(run_id, src=0, group=run.control)
    state = run_state(run.job, run.model_digest, counters, run_id[0])
    keep = run.job.settings.keep_checkpoints
    failure = save_checkpoint(run.engine, run.control, run.folder.checkpoints, run.step, state, keep)
    if failure is not None:
        run.tracker.log(run.step, "event", {"event": "checkpoint_failed", "reason": failure})
        if ending:
            raise CheckpointError(
                f"the checkpoint of the run's last step, {run.step}, could not be saved ({failure}); make room and run "
                "the same command, which goes on from the newest one that was saved"
            )
        run.progress.say(f"CHECKPOINT OF STEP {run.step} COULD NOT BE SAVED ({failure}); training goes on without it")
    run.watchdog.beat()


def announce(run: Run, resume: Resume | None) -> None:
    """Says on rank 0 what is about to run, and records it."""
    job, settings, environment = run.job, run.job.settings, run.environment
    for sentence in misspelt_keys(job.machine.config):
        run.progress.say(f"warning: {sentence}")
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in job.model.parameters())
    micro_batch = job.machine.micro_batch
    accumulation = settings.global_batch // (micro_batch * environment.world_size)
    run.progress.say(
        f"{parameters / 1e6:.1f} M parameters; {settings.global_batch} examples a step = "
        f"{environment.world_size} ranks x {micro_batch} x {accumulation}"
    )
    run.progress.say(f"watch it with: {view_command(settings.tracking, run.folder.path)}")
    event = {"event": "started", "world_size": environment.world_size, "total_steps": run.total_steps}
    if resume is not None:
        event |= {"event": "resumed", "checkpoint": resume.checkpoint.folder.name, "universal": resume.universal}
        run.progress.say(f"resuming at step {run.step} of {run.total_steps} from {resume.checkpoint.folder}")
    run.tracker.log(run.step, "event", event)
    run.tracker.artifact(run.folder.settings_file)


def finish(run: Run, code: int) -> int:
    """Leaves the process group together with the other ranks; rank 0 then has a finished run exported.

    The export is a process of its own, the same command as a user's. Returns the exit code.
    """
    dist.barrier(group=run.control)
    dist.destroy_process_group()
    if code == 0 and run.environment.is_main and run.job.settings.export:
        run.watchdog.close()
        export = [sys.executable, "-m", "quincunx.launchers.export", "--run", str(run.folder.path)]
        code = subprocess.run(export).returncode
        cards = sorted(run.folder.export.glob("*/README.md"))
        for path in [*cards[:1], *run.folder.export.glob("*.png")]:
            run.tracker.artifact(path)
    return code
