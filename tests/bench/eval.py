#!/usr/bin/env python3
"""Evaluation on the CPU beside lm-evaluation-harness's hf backend, in one sitting.

Builds `lorafleet`, installs torch and lm_eval into a virtual environment under target/ (some 5 GB, once), makes a Llama of
random weights, and asks both the same real questions in turn, ours then the harness's, so that a machine whose speed drifts
drifts for both. What both answer must be the same. Prints one JSON object: requests a second of each, the ratio of each
pair of neighbours, the medians. The harness is given the batch size with which it is fastest.

    tests/bench/eval.py
    tests/bench/eval.py --rounds 5 --out docs/benchmarks/eval-cpu.json

The questions are those of ../shared/data/eval (or LORAFLEET_SHARED): files of ARC and HellaSwag. LORAFLEET names another binary
than target/release/lorafleet.
"""

import argparse
import datetime
import json
import os
import pathlib
import shutil
import statistics
import sys

from common import LORAFLEET, ROOT, SHARED, build, output_of, processor, python_with, run, tell

PEER = ["torch==2.15.0", "transformers==5.23.0", "lm_eval[hf]==0.4.13"]
TARGET = 3.0
# A task, its file, and the examples before each question.
CASES = [("arc_challenge", "arc_challenge_test_100.jsonl", 0), ("arc_challenge", "arc_challenge_test_100.jsonl", 5),
         ("hellaswag", "hellaswag_val_100.jsonl", 0)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="pairs of runs of each case (default 3)")
    parser.add_argument("--limit", type=int, default=100, help="documents of each case (default 100, all that there are)")
    parser.add_argument("--out", type=pathlib.Path, help="write the JSON to this file too")
    args = parser.parse_args()
    if "LORAFLEET" not in os.environ:
        build()
    python = python_with("eval-venv", PEER)
    folder = ROOT / "target/eval-bench"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    peer = ROOT / "tests/bench/lmeval_peer.py"
    run([python, "-W", "ignore", peer, "model", SHARED / "data/models/llama2-tokenizer", folder / "model"])
    cases = [measure(python, peer, folder, SHARED / "data/eval" / file, task, shots, args)
             for task, file, shots in CASES]
    document = {
        "date": datetime.date.today().isoformat(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "command": " ".join(["tests/bench/eval.py", *sys.argv[1:]]),
        "peer": PEER,
        "target": TARGET,
        "reached": all(case["ratio"]["median"] >= TARGET for case in cases),
        "cases": cases,
    }
    tell(document, args.out)


def measure(python, peer, folder, data, task, shots, args):
    samples = folder / "samples.jsonl"

    def ours():
        document = json.loads(output_of([
            os.environ.get("LORAFLEET", str(LORAFLEET)), "eval", "--model", str(folder / "model"), "--tasks", task, "--task-data", f"{task}={data}",
            "--num-fewshot", str(shots), "--limit", str(args.limit), "--device", "cpu", "--log-samples", str(samples), "-o", "json",
        ]))
        answers = [json.loads(line)["loglikelihoods"] for line in samples.read_text().splitlines()]
        config = document["config"]
        return {"requests_per_second": config["requests"] / config["evaluation_seconds"], "answers": answers}

    def theirs(batch):
        return json.loads(output_of([
            str(python), "-W", "ignore", str(peer), "ask", str(folder / "model"), task, str(data), str(shots), str(batch), str(args.limit),
        ]))

    speeds = {batch: theirs(batch)["requests_per_second"] for batch in (1, 4, 16)}
    batch = max(speeds, key=speeds.get)
    pairs = []
    for _ in range(args.rounds):
        pair = ours(), theirs(batch)
        same(task, shots, *(side.pop("answers") for side in pair))
        pairs.append(pair)
        print(f"{task}, {shots} examples: {pair[0]['requests_per_second']:.1f} and {pair[1]['requests_per_second']:.1f} "
              f"requests/s", file=sys.stderr)
    ratios = sorted(a["requests_per_second"] / b["requests_per_second"] for a, b in pairs)

    def median(side):
        return statistics.median(pair[side]["requests_per_second"] for pair in pairs)

    return {
        "task": task, "num_fewshot": shots, "batch_size_of_lm_eval": batch, "lm_eval_by_batch_size": speeds,
        "requests_per_second": {"lorafleet": median(0), "lm_eval": median(1)},
        "ratio": {"median": statistics.median(ratios), "min": ratios[0], "max": ratios[-1]},
    }


def same(task, shots, ours, theirs):
    """Both say the same of every choice, to what float32 rounds."""
    assert len(ours) == len(theirs), f"{task}: {len(ours)} documents, not {len(theirs)}"
    for index, (a, b) in enumerate(zip(ours, theirs)):
        worst = max(abs(x - y) for x, y in zip(a, b, strict=True))
        assert worst < 1e-2, f"{task}, {shots} examples, document {index}: {a}, not {b}"


main()
