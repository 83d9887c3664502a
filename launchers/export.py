"""Exports a run's checkpoint: a pre-trained encoder in three forms, or a fine-tuned retriever or reranker.

python launchers/export.py --run runs/pretrain --output exported
"""

from dataclasses import dataclass
from pathlib import Path

from quincunx.data_shards.errors import exit_with_one_sentence
from quincunx.data_shards.setting import setting
from quincunx.engine.run_folder import SETTINGS_FILE
from quincunx.launchers.command_line import parse_settings


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """Settings of an export."""

    run: str = setting(role="data")
    """Run folder, the --output of pretrain.py or finetune.py."""
    output: str | None = None
    """Folder to write encoder/, sentence-transformers/ and bundle/, or retriever/, or reranker/ into (default:
    RUN/export)."""
    step: int | None = setting(None, low=0)
    """Checkpoint of this optimizer step (default: the newest)."""
    normalise: bool = False
    """The sentence-transformers model of a pre-trained encoder gives vectors of length 1."""


def main() -> None:
    settings = parse_settings(ExportSettings, __doc__.split("\n")[0])
    output = Path(settings.output or Path(settings.run, "export"))
    if is_finetuned(Path(settings.run)):
        from quincunx.engine.retrieval.finetuning import export_finetuned

        print(f"Exported {settings.run}: {export_finetuned(Path(settings.run), output, settings.step)}")
        return
    from quincunx.engine.export import export_run

    checkpoint = export_run(Path(settings.run), output, settings.normalise, settings.step)
    print(f"Exported step {checkpoint.step} of {settings.run}:")
    print(f"  {output / 'encoder'}  for transformers: AutoModel.from_pretrained")
    print(f"  {output / 'sentence-transformers'}  for sentence-transformers: SentenceTransformer")
    print(f"  {output / 'bundle'}  to go on pre-training: pretrain.py --encoder {output / 'bundle'}")


def is_finetuned(run_folder: Path) -> bool:
    """Whether finetune.py made the run: its settings name a stage."""
    import yaml

    settings = run_folder / SETTINGS_FILE
    return settings.is_file() and "stage" in yaml.safe_load(settings.read_text())


if __name__ == "__main__":
    exit_with_one_sentence(main)
