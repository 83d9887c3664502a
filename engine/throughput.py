"""What a training run says about itself: mean losses between two log lines, rates, model FLOPs, the progress line."""

import re
import sys
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

from quincunx.engine.ranks import sum_over_ranks

if TYPE_CHECKING:
    from quincunx.engine.training import Job, StepOutput

PEAK_FLOPS = {
    "B200": 2250e12, "H200": 989e12, "H100 PCIE": 756e12, "GH200": 989e12, "H100": 989e12, "A100": 312e12,
    "A40": 150e12, "A30": 165e12, "A10": 125e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12, "V100": 125e12,
    "RTX 4090": 165e12, "RTX 3090": 71e12, "MI300X": 1307e12, "MI250X": 383e12,
}  # fmt: skip
"""Dense 16-bit matrix FLOP/s by the makers' data sheets; the first name that stands in the card's as words counts."""


class Window:
    """Sums over the steps since the last log line; tensors stay on the device until `metrics` is called."""

    def __init__(self, job: "Job", device: torch.device, peak_flops: float | None):
        """peak_flops: of all ranks' cards together, None where it is not known (a CPU): no mfu then."""
        self._job, self._device, self._peak = job, device, peak_flops
        self._start()

    def _start(self) -> None:
        num_tasks = len(self._job.loss_weights)
        self._sums = torch.zeros(2, num_tasks, dtype=torch.float64, device=self._device)
        self._counts = np.zeros(num_tasks)
        self._passages = self._tokens = self._flops = self._cut = 0.0
        self._began, self._waited = time.monotonic(), self._job.stream.wait_seconds

    def add(self, batches: list, outputs: "list[StepOutput]") -> None:
        """One applied optimizer step of this rank."""
        for batch, output in zip(batches, outputs, strict=True):
            self._sums += torch.stack([output.nll_sums, output.correct]).to(self._sums)
            self._counts += self._job.model.loss_counts(batch)
            self._passages += batch.num_passages
            self._tokens += batch.num_tokens
            self._cut += batch.num_cut_texts
            self._flops += output.flops

    def metrics(self) -> dict[str, float]:
        """Means over all ranks since the last call, and starts anew; every rank must call it.

        loss/TASK in nats per labelled token (or query), accuracy/TASK, loss/total (weighted), passages_per_second,
        tokens_per_second (the encoder's), cut_texts (longer than max_tokens), mfu; of this rank data_wait_share of its
        time and memory_gb.
        """
        rest = [*self._counts, self._passages, self._tokens, self._flops, self._cut]
        mine = torch.cat([self._sums.flatten(), torch.tensor(rest, dtype=torch.float64, device=self._device)])
        totals = sum_over_ranks(mine).cpu().numpy()
        seconds = max(time.monotonic() - self._began, 1e-9)
        weights, n = self._job.loss_weights, len(self._counts)
        nll_sums, correct, counts = totals[:n], totals[n : 2 * n], totals[2 * n : 3 * n]
        passages, tokens, flops, cut = totals[3 * n :]
        metrics = {f"loss/{name}": nll_sums[i] / counts[i] for i, name in enumerate(weights) if counts[i]}
        metrics |= {f"accuracy/{name}": correct[i] / counts[i] for i, name in enumerate(weights) if counts[i]}
        if metrics:
            metrics["loss/total"] = sum(weight * metrics.get(f"loss/{name}", 0.0) for name, weight in weights.items())
        metrics["passages_per_second"] = passages / seconds
        metrics["tokens_per_second"] = tokens / seconds
        metrics["cut_texts"] = cut
        metrics["data_wait_share"] = (self._job.stream.wait_seconds - self._waited) / seconds
        metrics["memory_gb"] = peak_memory_gb(self._device)
        if self._peak:
            metrics["mfu"] = flops / seconds / self._peak
        self._start()
        return {name: float(value) for name, value in metrics.items()}


def peak_flops_of(device: torch.device, world_size: int, precision: str) -> float | None:
    """Peak FLOP/s of all ranks' cards; None on a CPU, for an unknown card, and in float32."""
    if device.type != "cuda" or precision == "float32":
        return None
    name = torch.cuda.get_device_name(device).upper()
    return next((peak * world_size for card, peak in PEAK_FLOPS.items() if re.search(rf"\b{card}\b", name)), None)


def peak_memory_gb(device: torch.device) -> float:
    """Most memory held so far in gigabytes: the GPU's where there is one, else this process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


class Progress:
    """Rank 0's progress: a bar with ETA on a terminal, a line per log interval elsewhere."""

    def __init__(self, first_step: int, total_steps: int, is_main: bool):
        self._first, self._total, self._is_main = first_step, total_steps, is_main
        self._began = time.monotonic()
        shown = {"unit": "step", "dynamic_ncols": True, "smoothing": 0.1, "disable": not is_main or None}
        self._bar = tqdm(total=total_steps, initial=first_step, **shown)  # None: disabled where there is no terminal

    def step(self) -> None:
        self._bar.update()

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Shows the losses after `step` optimizer steps."""
        losses = {name.removeprefix("loss/"): value for name, value in metrics.items() if name.startswith("loss/")}
        shown = " ".join(f"{name} {value:.3f}" for name, value in losses.items() if name != "total")
        self._bar.set_postfix_str(shown)
        if self._bar.disable:
            left = (time.monotonic() - self._began) / max(step - self._first, 1) * (self._total - step)
            rate = f"{metrics['passages_per_second']:.1f} passages/s"
            self.say(f"step {step}/{self._total}  {shown}  {rate}  {tqdm.format_interval(left)} left")

    def say(self, line: str) -> None:
        """Prints a line above the bar, on rank 0."""
        if self._is_main:
            tqdm.write(line, file=sys.stderr)

    def close(self) -> None:
        self._bar.close()
