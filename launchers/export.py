"""Exports a run's newest checkpoint: Hugging Face encoder, sentence-transformers model, full pre-training bundle.

python launchers/export.py --run runs/pretrain --output exported
"""

from dataclasses import dataclass
from pathlib import Path

from quincunx.data_shards.errors import exit_with_one_sentence
from quincunx.launchers.command_line import parse_settings


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """Settings of an export."""

    run: str
    """Run folder, the --output of pretrain.py."""
    output: str | None = None
    """Folder to write encoder/, sentence-transformers/ and bundle/ into (default: RUN/export)."""
    normalise: bool = False
    """The sentence-transformers model gives vectors of length 1."""


def main() -> None:
    settings = parse_settings(ExportSettings, __doc__.split("\n")[0])
    from quincunx.engine.export import export_run

    output = Path(settings.output or Path(settings.run, "export"))
    checkpoint = export_run(Path(settings.run), output, settings.normalise)
    print(f"Exported step {checkpoint.step} of {settings.run}:")
    print(f"  {output / 'encoder'}  for transformers: AutoModel.from_pretrained")
    print(f"  {output / 'sentence-transformers'}  for sentence-transformers: SentenceTransformer")
    print(f"  {output / 'bundle'}  to go on pre-training: pretrain.py --encoder {output / 'bundle'}")


if __name__ == "__main__":
    exit_with_one_sentence(main)
