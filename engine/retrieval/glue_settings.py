"""What a GLUE run learns and from what. The defaults are BERT's, which MASTER (appendix C) takes over.

BERT (Devlin and others, 2019, section 4.1 and appendix A.3): batches of 32, 3 epochs, the best learning rate on dev of
5e-5, 4e-5, 3e-5 and 2e-5, dropout 0.1; the tokens, the warm-up and epsilon are those of its published code.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from quincunx.engine.run_settings import RunSettings, find_run_problems


@dataclass(frozen=True, kw_only=True)
class GlueSettings(RunSettings):
    """Settings of a GLUE run."""

    MODEL_FIELDS: ClassVar = ("task", "encoder")
    MACHINE_FIELDS: ClassVar = (*RunSettings.MACHINE_FIELDS, "dev_every", "test")
    DATA_FIELDS: ClassVar = ("data", "train", "dev")
    LOCAL_FIELDS: ClassVar = (*RunSettings.LOCAL_FIELDS, "data", "train", "dev", "test")

    task: Literal["cola", "mrpc", "stsb", "qqp"] = "mrpc"
    """What is learned: acceptability of a sentence (cola), paraphrase (mrpc), similarity from 0 to 5 (stsb), duplicate
    questions (qqp)."""
    data: str = ""
    """Folder with train.tsv, dev.tsv and perhaps test.tsv as in the GLUE download, or the same as .jsonl."""
    train: str | None = None
    """Training file (default: the folder's), such as msr_paraphrase_train.txt."""
    dev: str | None = None
    """File that is measured on (default: the folder's)."""
    test: str | None = None
    """File that predictions are written for (default: the folder's, where it has one)."""
    skip_broken_rows: bool = False
    """Leave out rows of train and dev with a wrong number of columns, and say how many; the published QQP has some."""
    output: str = "runs/glue"
    """Run folder: checkpoints, metrics.jsonl, settings.yaml, export/. The same command on the same folder resumes."""
    encoder: str = "bert-base-uncased"
    """Model to start from: a pre-training run's export/encoder, a Hugging Face name or folder, package:NAME/FOLDER."""
    max_tokens: int = 128
    """Longest sentence or pair in tokens, special tokens included; a longer pair loses tokens of its longer side."""
    dev_every: int = 500
    """Steps between measurements on dev (also before the first step and after the last); 0 never."""

    epochs: float | None = 3.0
    """Length of the run in passes over the training data (BERT: 3); give this or steps."""
    global_batch: int = 32
    """Examples of one optimizer step, over ranks and accumulation (BERT: 32)."""
    learning_rate: float = 2e-5
    """Peak learning rate (BERT: the best on dev of 5e-5, 4e-5, 3e-5 and 2e-5)."""
    dropout: float | None = None
    """Dropout, head included (default: the model's; BERT: 0.1)."""
    adam_eps: float = 1e-6
    """AdamW's epsilon (BERT's code: 1e-6)."""


def find_problems(settings: GlueSettings) -> list[str]:
    """Every value out of its range and every contradiction, each as one clause; empty where there is none."""
    problems, s = find_run_problems(settings), settings
    if not s.data and not (s.train and s.dev):
        problems.append(f"data is not given; name the folder of {s.task}'s files, or give train and dev")
    if s.data and not Path(s.data).is_dir():
        problems.append(f"data {s.data} is no folder; name the one that holds {s.task}'s train.tsv and dev.tsv")
    if s.max_tokens < 8:
        problems.append(f"max_tokens is {s.max_tokens}; it must be at least 8")
    if s.dev_every < 0:
        problems.append(f"dev_every is {s.dev_every}; it must be at least 0")
    return problems


def find_idle_settings(settings: GlueSettings) -> list[str]:
    """One sentence per setting that was given but has no effect."""
    return [] if settings.probe is None else ["probe has no effect here: a GLUE run is measured on its dev file"]
