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
import platform
import statistics
import subprocess
import sys
import venv

ROOT = pathlib.Path(__file__).resolve().parents[2]
PEER = ["torch==2.15.0", "transformers==5.23.0", "peft==0.21.2"]
TARGET = {"speed": 1.15, "memory": 0.60}


def run(command, **options):
    """Runs a command whose output is for people, out of the way of our own."""
    subprocess.run(command, check=True, cwd=ROOT, stdout=sys.stderr, **options)


def measure(command):
    done = subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    result = json.loads(done.stdout)
    print(f"{result['tokens_per_second']:8.0f} tokens/s  {command[0]}", file=sys.stderr)
    return result


def peer_python():
    """The virtual environment's python, with the peer installed."""
    folder = ROOT / "target" / "bench-venv"
    python = folder / "bin" / "python"
    installed = folder / "installed"
    if not installed.is_file() or installed.read_text() != "\n".join(PEER):
        venv.create(folder, with_pip=True)
        run([python, "-m", "pip", "install", "--quiet", *PEER])
        installed.write_text("\n".join(PEER))
    return python


def processor():
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="pairs of runs (default 7)")
    parser.add_argument("--out", type=pathlib.Path, help="write the JSON to this file too")
    args, flags = parser.parse_known_args()
    run(["cargo", "build", "--release", "--locked", "--package", "lorafleet-cli"])
    ours = [str(ROOT / "target/release/lorafleet"), "bench", "train", *flags]
    peer = [str(peer_python()), "-W", "ignore", str(ROOT / "tests/bench/peft_train.py"), *flags]
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
    text = json.dumps(document, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


main()
