"""The demo's result over several seeds, and the README's picture of it.

    for seed in 42 43 44; do SEED=$seed OUTPUT=demo_run_$seed recipes/chains/demo.sh; done
    python benchmarks/demo_seeds.py demo_run_42 demo_run_43 demo_run_44

Writes benchmarks/results/demo_seeds.json (MRR@10 of every system and seed, paired tests, curves of the probe) and
docs/demo.svg.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import yaml

from quincunx.engine.export import curves
from quincunx.engine.report import plot_curves
from quincunx.engine.retrieval.study_report import describe_code
from quincunx.launchers.demo import MEASURE, compare_systems

ROOT = Path(__file__).resolve().parent.parent


def read_demo(folder: Path) -> dict:
    """The numbers of one demo."""
    found, gains = compare_systems(folder)
    return {
        "seed": yaml.safe_load((folder / "ours" / "settings.yaml").read_text())["seed"],
        "queries": found["ours"].counts["judged"],
        "mrr@10": {name: evaluation.means[MEASURE] for name, evaluation in found.items()},
        "ours_against": {name: asdict(gain) for name, gain in gains.items()},
        "probe": {run: list(zip(*curves(folder / run, "probe", "probe/")["mrr@10"])) for run in ("mlm", "ours")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demos", type=Path, nargs="+", help="folders of finished demos")
    demos = [read_demo(folder) for folder in parser.parse_args().demos]
    path = ROOT / "benchmarks" / "results" / "demo_seeds.json"
    path.write_text(json.dumps({"code": describe_code(), "demos": demos}, indent=1) + "\n")
    lines = {
        f"{name}, mean of {len(demos)} seeds": (
            [step for step, _ in demos[0]["probe"][run]],
            np.mean([[value for _, value in demo["probe"][run]] for demo in demos], axis=0),
        )
        for run, name in (("ours", "ours"), ("mlm", "MLM alone"))
    }
    (ROOT / "docs" / "demo.svg").write_text(plot_curves({"MRR@10 of [CLS] without fine-tuning": lines}))
    for demo in demos:
        against = {
            name: f"{gain['difference']:+.3f} (p {gain['t_test_p']:.0e})" for name, gain in demo["ours_against"].items()
        }
        print(demo["seed"], {name: round(value, 3) for name, value in demo["mrr@10"].items()}, against)


if __name__ == "__main__":
    main()
