#!/usr/bin/env python3
"""Training steps on the CPU beside Hugging Face PEFT's, in one sitting.

Builds `lorafleet`, installs torch and PEFT into a virtual environment under target/ (some 5 GB, once), and runs
the two benchmarks in turn, ours then PEFT's, so that a machine whose speed drifts drifts for both. Prints one
JSON object: the ratio of each pair of neighbours, the medians, and every single result.

    tests/bench/train.py                     # the shape of the published target
    tests/bench/train.py --rounds 9 --out docs/benchmarks/train-cpu.json
    tests/bench/train.py --hidden 256 --seq 512    # other flags go to both benchmarks
"""

import argparse
import datetime
import json
import os
import pathlib
import statistics
import sys

from common import LORAFLEET, ROOT, build, output_of, processor, python_with, tell

PEER = ["torch==2.15.0", "transformers==5.23.0", "peft==0.21.2"]
TARGET = {"speed": 1.15, "memory": 0.60}


def measure(command):
    result = json.loads(output_of(command))
    print(f"{result['tokens_per_second']:8.0f} tokens/s  {command[0]}", file=sys.stderr)
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="pairs of runs (default 7)")
    parser.add_argument("--out", type=pathlib.Path, help="write the JSON to this file too")
    args, flags = parser.parse_known_args()
    build()
    ours = [str(LORAFLEET), "bench", "train", *flags]
    peer = [str(python_with("bench-venv", PEER)), "-W", "ignore", str(ROOT / "tests/bench/peft_train.py"), *flags]
    pairs = [(measure(ours), measure(peer)) for _ in range(args.rounds)]

    def median(of, key):
        return statistics.median(pair[of][key] for pair in pairs)

    ratios = sorted(a["tokens_per_second"] / b["tokens_per_second"] for a, b in pairs)
    memory = median(0, "peak_rss_bytes") / median(1, "peak_rss_bytes")
    speed = statistics.median(ratios)
    document = {
        "date": datetime.date.today().isoformat(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "command": " ".join(["tests/bench/train.py", *sys.argv[1:]]),
        "tokens_per_second": {"lorafleet": median(0, "tokens_per_second"), "peft": median(1, "tokens_per_second")},
        "peak_rss_bytes": {"lorafleet": median(0, "peak_rss_bytes"), "peft": median(1, "peak_rss_bytes")},
        "speed_ratio": {"median": speed, "min": ratios[0], "max": ratios[-1]},
        "memory_ratio": memory,
        "target": TARGET,
        "reached": {"speed": speed >= TARGET["speed"], "memory": memory <= TARGET["memory"]},
        "rounds": [{"lorafleet": a, "peft": b} for a, b in pairs],
    }
    tell(document, args.out)


main()
