#!/usr/bin/env python3
"""What a coordinator schedules, keeps and lists, beside Optuna and Ray Tune, in one sitting.

Builds `lorafleet`, installs the peers into a virtual environment under target/ (some 700 MB, once), and runs
`lorafleet bench orchestration` and the peers in turn on the same disk. Prints one JSON object: medians, ratios and
every single result.

    tests/bench/orchestration.py
    tests/bench/orchestration.py --rounds 5 --dir /data --out docs/benchmarks/orchestration.json
"""

import argparse
import datetime
import json
import os
import pathlib
import statistics
import sys
import tempfile

from common import LORAFLEET, ROOT, build, output_of, processor, python_with, tell

PEERS = ["optuna==5.0.0", "ray[tune]==2.60.0"]
KINDS = ["optuna_sqlite", "optuna_journal", "ray_tune"]


def measure(command):
    # Ray says things to standard output that are none of ours.
    text = output_of(command)
    return json.loads(text[text.index("{"):] if text.lstrip().startswith("{") else text.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="times that each is run, in turn")
    parser.add_argument("--dir", help="a folder on the disk to use")
    parser.add_argument("--out", type=pathlib.Path, help="also write the JSON here")
    args = parser.parse_args()
    build()
    python = python_with("bench-orchestration-venv", PEERS)
    ours, peers = [], []
    for number in range(args.rounds):
        print(f"round {number + 1} of {args.rounds}", file=sys.stderr)
        dir_flag = ["--dir", args.dir] if args.dir else []
        ours.append(measure([LORAFLEET, "bench", "orchestration", *dir_flag]))
        with tempfile.TemporaryDirectory(dir=args.dir) as folder:
            peers.append(measure([python, ROOT / "tests/bench/orchestration_peers.py", folder]))

    def median(values):
        return statistics.median(list(values))

    figures = {
        "trials_per_second": median(o["trials"]["trials_per_second"] for o in ours),
        "reports_per_second": median(o["reports"]["reports_per_second"] for o in ours),
        "trials_list_seconds": median(o["trials_list_seconds"] for o in ours),
        "coordinator_peak_rss_bytes": median(o["coordinator"]["at_end"]["peak_rss_bytes"] for o in ours),
    }
    ratios = {
        kind: {
            key: median(o[part][key] / p[kind][key] for o, p in zip(ours, peers))
            for part, key in [("trials", "trials_per_second"), ("reports", "reports_per_second")]
        }
        for kind in KINDS
    }
    document = {
        "benchmark": "orchestration",
        "date": datetime.date.today().isoformat(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "median": figures,
        "median_ratio": ratios,
        "lorafleet": ours,
        "peers": peers,
    }
    tell(document, args.out)


if __name__ == "__main__":
    main()
