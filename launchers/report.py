"""Makes the report of a pipeline: one HTML page that needs nothing else, and Markdown with its plots.

    python launchers/report.py --pipeline chain_run

The pipeline makes it at its end; by hand it can be made as soon as one evaluation is done. See docs/pipeline.md.
"""

from dataclasses import dataclass
from pathlib import Path

from quincunx.data_shards.errors import exit_with_one_sentence
from quincunx.launchers.command_line import parse_settings


@dataclass(frozen=True, kw_only=True)
class ReportSettings:
    """Settings of a report."""

    pipeline: str
    """Folder of a pipeline, its --output."""
    output: str | None = None
    """Folder to write report.html, report.md and the plots into (default: PIPELINE/report)."""


def main() -> None:
    settings = parse_settings(ReportSettings, __doc__.split("\n")[0])
    from quincunx.engine.retrieval.report import load_chain, make_blocks
    from quincunx.engine.retrieval.report_blocks import write_report

    output = Path(settings.output or Path(settings.pipeline, "report"))
    for path in write_report(output, make_blocks(load_chain(Path(settings.pipeline)))):
        print(path)


if __name__ == "__main__":
    exit_with_one_sentence(main)
