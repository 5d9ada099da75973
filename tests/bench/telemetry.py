#!/usr/bin/env python3
"""What telemetry costs a training step, at default settings.

Runs one and the same sweep with `lorafleet run` three ways: without telemetry (OTEL_SDK_DISABLED=true), with a collector that
takes connections and never answers, and with one that answers at once. One trial of a tiny base, whose steps are short, each of
them reported (logging_steps: 1). The three processes run in turn, a fraction of a second each, until all have ended. Prints one
JSON object: CPU seconds of the whole process a step, its start and its end included, and wall seconds of a step; the
medians, and the median of each round's ratios with its interval of 95 % (of six rounds or more) and their range. CPU time is the
figure.

    tests/bench/telemetry.py                              # the base and the rows in ../shared (or LORAFLEET_SHARED)
    tests/bench/telemetry.py --rounds 9 --steps 600 --out docs/benchmarks/telemetry.json

LORAFLEET names another binary than target/release/lorafleet.
"""

import argparse
import datetime
import http.server
import json
import math
import multiprocessing
import os
import pathlib
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time

from common import LORAFLEET, SHARED, build, processor, tell

TARGET = 1.01
# Seconds of a turn.
SLICE = 0.2


class Answering(http.server.BaseHTTPRequestHandler):
    """Takes what it is sent, and says so."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.count[self.path] = self.server.count.get(self.path, 0) + 1
        self.send_response(200)
        self.send_header("Content-Type", "application/x-protobuf")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


def answer(address, counted):
    """A collector, in a process of its own; its calls are counted by their paths."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answering)
    server.count = counted
    address.send(server.server_address[1])
    server.serve_forever()


def measure(folder, number, steps, ways):
    """Runs the sweep once each way, in turn for SLICE seconds: CPU seconds and wall seconds a step.

    A machine whose speed drifts, or that others use, drifts for all of them alike.
    """
    binary = os.environ.get("LORAFLEET", LORAFLEET)
    running, result = {}, {}
    for way, variables in ways.items():
        name = f"{way}-{number}"
        environment = {key: value for key, value in os.environ.items() if not key.startswith("OTEL_")}
        # Threads that wait for each other spin, the more the busier the machine is: that is no cost of telemetry.
        environment.update(variables, RAYON_NUM_THREADS="1", XDG_CONFIG_HOME=str(folder / "config"))
        command = [binary, "run", "sweep.yaml", "--data-dir", name, "-o", "json"]
        with open(folder / f"{name}.json", "wb") as said:
            process = subprocess.Popen(command, cwd=folder, env=environment, stdout=said, stderr=subprocess.DEVNULL)
        os.kill(process.pid, signal.SIGSTOP)
        running[way] = process.pid
    while running:
        for way, pid in list(running.items()):
            os.kill(pid, signal.SIGCONT)
            time.sleep(SLICE)
            os.kill(pid, signal.SIGSTOP)
            ended, status, usage = os.wait4(pid, os.WNOHANG)
            if ended == 0:
                continue
            del running[way]
            [trial] = json.loads((folder / f"{way}-{number}.json").read_text())["trials"]
            assert status == 0 and trial["state"] == "completed" and trial["step"] == steps, (way, status, trial)
            result[way] = {
                "cpu_seconds_per_step": (usage.ru_utime + usage.ru_stime) / steps,
                # The others had their turns meanwhile.
                "wall_seconds_per_step": trial["summary"]["device_seconds"] / len(ways) / steps,
            }
    for way in ways:
        print(f"{way:>10}  CPU {result[way]['cpu_seconds_per_step'] * 1e3:.3f} ms a step", file=sys.stderr)
    return {way: result[way] for way in ways}


def interval(ordered):
    """The median's interval of at least 95 %, of ordered values: by how many of so many fall below a median."""
    count, outside, tail = len(ordered), 0, 0.0
    while tail + math.comb(count, outside) / 2**count <= 0.025:
        tail += math.comb(count, outside) / 2**count
        outside += 1
    # Of fewer than six values no two have so much between them.
    lowest = max(outside - 1, 0)
    return [ordered[lowest], ordered[-1 - lowest]]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="runs of each way (default 5)")
    parser.add_argument("--steps", type=int, default=400, help="steps of a run (default 400)")
    parser.add_argument("--model", type=pathlib.Path, default=SHARED / "data/models/stories260K-hf")
    parser.add_argument("--data", type=pathlib.Path, default=SHARED / "data/instruct/instruct_500_guanaco.jsonl")
    parser.add_argument("--out", type=pathlib.Path, help="write the JSON to this file too")
    args = parser.parse_args()
    if "LORAFLEET" not in os.environ:
        build()
    sweep = {
        "name": "telemetry", "pretrained_model_id": str(args.model.resolve()), "dataset_name": str(args.data.resolve()),
        "max_steps": args.steps, "logging_steps": 1, "batch_size": 2, "max_sequence_length": 128,
        "search": {"algorithm": "grid"}, "parameters": {"lora_rank": [8]},
    }
    silent = socket.create_server(("127.0.0.1", 0), backlog=1024)
    with multiprocessing.Manager() as manager, tempfile.TemporaryDirectory() as folder:
        counted = manager.dict()
        address, theirs = multiprocessing.Pipe(duplex=False)
        collector = multiprocessing.Process(target=answer, args=(theirs, counted), daemon=True)
        collector.start()
        at = "http://127.0.0.1:{}".format
        ways = {
            "disabled": {"OTEL_SDK_DISABLED": "true"},
            "silent": {"OTEL_EXPORTER_OTLP_ENDPOINT": at(silent.getsockname()[1])},
            "answering": {"OTEL_EXPORTER_OTLP_ENDPOINT": at(address.recv())},
        }
        folder = pathlib.Path(folder)
        (folder / "sweep.yaml").write_text(json.dumps(sweep))
        rounds = [measure(folder, number, args.steps, ways) for number in range(args.rounds)]
        collector.terminate()
        for path in ["/v1/traces", "/v1/metrics", "/v1/logs"]:
            assert counted.get(path, 0) >= args.rounds, f"the collector was not sent {path}: {dict(counted)}"

    def ratios(way, key):
        found = sorted(each[way][key] / each["disabled"][key] for each in rounds)
        return {"median": statistics.median(found), "interval": interval(found), "min": found[0], "max": found[-1]}

    keys = ["cpu_seconds_per_step", "wall_seconds_per_step"]
    found = {way: {key: ratios(way, key) for key in keys} for way in ["silent", "answering"]}
    document = {
        "date": datetime.date.today().isoformat(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "system": platform.release(),
        "command": " ".join(["tests/bench/telemetry.py", *sys.argv[1:]]),
        "steps": args.steps,
        "median": {way: {key: statistics.median(each[way][key] for each in rounds) for key in keys} for way in ways},
        "ratio_to_disabled": found,
        "target": {"cpu_seconds_per_step": TARGET},
        # Said where what rounds differ by leaves no doubt of it.
        "reached": {way: found[way]["cpu_seconds_per_step"]["interval"][1] <= TARGET for way in found},
        "rounds": rounds,
    }
    tell(document, args.out)


main()
