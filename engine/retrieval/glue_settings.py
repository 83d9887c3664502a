"""What a GLUE run learns and from what. The defaults are BERT's, which MASTER (appendix C) takes over.

BERT (Devlin and others, 2019, section 4.1 and appendix A.3): batches of 32, 3 epochs, the best learning rate on dev of
5e-5, 4e-5, 3e-5 and 2e-5, dropout 0.1; the tokens, the warm-up and epsilon are those of its published code.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from quincunx.data_shards.setting import setting
from quincunx.engine.settings import RunSettings


@dataclass(frozen=True, kw_only=True)
class GlueSettings(RunSettings):
    """Settings of a GLUE run."""

    task: Literal["cola", "mrpc", "stsb", "qqp"] = setting("mrpc", role="model")
    """What is learned: acceptability of a sentence (cola), paraphrase (mrpc), similarity from 0 to 5 (stsb), duplicate
    questions (qqp)."""
    data: str = setting("", role="data", local=True)
    """Folder with train.tsv, dev.tsv and perhaps test.tsv as in the GLUE download, or the same as .jsonl."""
    train: str | None = setting(None, role="data", local=True)
    """Training file (default: the folder's), such as msr_paraphrase_train.txt."""
    dev: str | None = setting(None, role="data", local=True)
    """File that is measured on (default: the folder's)."""
    test: str | None = setting(None, role="machine", local=True)
    """File that predictions are written for (default: the folder's, where it has one)."""
    skip_broken_rows: bool = False
    """Leave out rows of train and dev with a wrong number of columns, and say how many; the published QQP has some."""
    output: str = setting("runs/glue", role="machine", local=True)
    """Run folder: checkpoints, metrics.jsonl, settings.yaml, export/. The same command on the same folder resumes."""
    encoder: str = setting("bert-base-uncased", role="model")
    """Model to start from: a pre-training run's export/encoder, a Hugging Face name or folder, package:NAME/FOLDER."""
    max_tokens: int = setting(128, low=8)
    """Longest sentence or pair in tokens, special tokens included; a longer pair loses tokens of its longer side."""
    dev_every: int = setting(500, low=0, role="machine")
    """Steps between measurements on dev (also before the first step and after the last); 0 never."""

    epochs: float | None = setting(3.0, above=0, below=10**9)
    """Length of the run in passes over the training data (BERT: 3); give this or steps."""
    global_batch: int = setting(32, low=1, high=2**24, role="stream")
    """Examples of one optimizer step, over ranks and accumulation (BERT: 32)."""
    learning_rate: float = setting(2e-5, above=0, below=10**6)
    """Peak learning rate (BERT: the best on dev of 5e-5, 4e-5, 3e-5 and 2e-5)."""
    dropout: float | None = setting(None, low=0, below=1)
    """Dropout, head included (default: the model's; BERT: 0.1)."""
    adam_eps: float = setting(1e-6, above=0, below=10**6)
    """AdamW's epsilon (BERT's code: 1e-6)."""

    def contradictions(self) -> list[str]:
        problems = super().contradictions()
        if not self.data and not (self.train and self.dev):
            problems.append(f"data is not given; name the folder of {self.task}'s files, or give train and dev")
        if self.data and not Path(self.data).is_dir():
            problems.append(
                f"data {self.data} is no folder; name the one that holds {self.task}'s train.tsv and dev.tsv"
            )
        return problems


def find_idle_settings(settings: GlueSettings) -> list[str]:
    """One sentence per setting that was given but has no effect."""
    return [] if settings.probe is None else ["probe has no effect here: a GLUE run is measured on its dev file"]
