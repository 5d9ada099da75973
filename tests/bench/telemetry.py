#!/usr/bin/env python3
"""What telemetry costs a training step, at default settings.

Runs one and the same sweep again and again with `lorafleet run`, in turn without telemetry (OTEL_SDK_DISABLED=true), with a
collector that takes connections and never answers, and with one that answers at once: one trial of a tiny base, whose steps
are as short as steps get, each of them reported (logging_steps: 1). Prints one JSON object: CPU seconds of the whole process
a step and wall seconds a step, the medians, and the median of each round's ratios. CPU time is the figure: it does not depend
on what else the machine does.

    tests/bench/telemetry.py                              # the base and the rows in ../shared (or LORAFLEET_SHARED)
    tests/bench/telemetry.py --rounds 12 --steps 600 --out docs/benchmarks/telemetry.json

LORAFLEET names another binary than target/release/lorafleet.
"""

import argparse
import datetime
import http.server
import json
import multiprocessing
import os
import pathlib
import platform
import socket
import statistics
import subprocess
import sys
import tempfile

from common import LORAFLEET, ROOT, build, processor, tell

TARGET = 1.01
SHARED = pathlib.Path(os.environ.get("LORAFLEET_SHARED", ROOT.parent / "shared")) / "data"


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


def measure(folder, name, steps, variables):
    """One run: CPU seconds and wall seconds a step."""
    binary = os.environ.get("LORAFLEET", LORAFLEET)
    command = [binary, "run", "sweep.yaml", "--data-dir", name, "-o", "json"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("OTEL_")}
    environment.update(variables, XDG_CONFIG_HOME=str(folder / "config"))
    with open(folder / f"{name}.json", "wb") as said:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=said, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        sys.exit(f"{' '.join(map(str, command))} failed in {folder}")
    [trial] = json.loads((folder / f"{name}.json").read_text())["trials"]
    assert trial["state"] == "completed" and trial["step"] == steps, trial
    result = {
        "cpu_seconds_per_step": (usage.ru_utime + usage.ru_stime) / steps,
        "wall_seconds_per_step": trial["summary"]["device_seconds"] / steps,
    }
    print(f"{name:>14}  CPU {result['cpu_seconds_per_step'] * 1e3:.3f} ms a step", file=sys.stderr)
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="runs of each (default 9)")
    parser.add_argument("--steps", type=int, default=400, help="steps of a run (default 400)")
    parser.add_argument("--model", type=pathlib.Path, default=SHARED / "models/stories260K-hf")
    parser.add_argument("--data", type=pathlib.Path, default=SHARED / "instruct/instruct_500_guanaco.jsonl")
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
        # Files are read for the first time, and are not again.
        measure(folder, "warm-up", args.steps, ways["disabled"])
        rounds = []
        for number in range(args.rounds):
            run = lambda way: measure(folder, f"{way}-{number}", args.steps, ways[way])  # noqa: E731
            rounds.append({way: run(way) for way in ways})
        collector.terminate()
        for path in ["/v1/traces", "/v1/metrics", "/v1/logs"]:
            assert counted.get(path, 0) >= args.rounds, f"the collector was not sent {path}: {dict(counted)}"

    def ratios(way, key):
        found = sorted(each[way][key] / each["disabled"][key] for each in rounds)
        quartiles = statistics.quantiles(found, n=4, method="inclusive") if len(found) > 1 else found * 3
        return {"median": statistics.median(found), "quartiles": [quartiles[0], quartiles[2]], "all": found}

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
        "reached": {way: found[way]["cpu_seconds_per_step"]["median"] <= TARGET for way in found},
        "rounds": rounds,
    }
    tell(document, args.out)


main()
