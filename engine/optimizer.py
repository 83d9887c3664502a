"""What the optimizer is told: the learning rate of a step, and which parameters decay."""

from typing import Any


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
