#!/usr/bin/env python3
"""What it costs training that adapters are streamed to a coordinator.

Sixteen trials train for real, four on each of four agents, over the real protocol with a coordinator that keeps what it is sent on
a local disk. One fleet checkpoints each trial about every 10 seconds (an adapter of 10 MB and its moments of 20 MB, uploaded
while the trial trains on), the other one at the end alone. Both run in turn, a second each, until both have ended. An agent trains
on one thread. The base is a small Llama of random weights, whose steps are short. Prints one JSON object, all seconds a step of one
trial:

    training_cpu_seconds      CPU time of the threads that train, between steps too, where the states of checkpoints are taken
    training_seconds          the time that these threads spent in steps
    agents_other_cpu_seconds  CPU time of all else in the agents: the threads that write checkpoints, and the uploads
    coordinator_cpu_seconds   CPU time of the coordinator, which on a fleet is another machine

The cost is what the first two are with checkpoints, divided by what they are without: medians, and each round's ratios with their
range. The second one holds where every thread has a core: on fewer than six cores, agents and coordinator take turns.

    tests/bench/adapters.py                               # tokenizer and rows in ../shared (or LORAFLEET_SHARED)
    tests/bench/adapters.py --rounds 5 --dir /data --out docs/benchmarks/adapters.json

LORAFLEET names another binary than target/release/lorafleet; coordinator and gpu-agent are beside it.
"""

import argparse
import array
import contextlib
import datetime
import json
import math
import os
import pathlib
import platform
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request

from common import PATIENCE, SHARED, Programs, build, free_port, processor, tell, until

TARGET = 1.02
COSTS = ["training_cpu_seconds", "training_seconds"]
# Trials that a CPU trains together at most.
PACK = 4
# Seconds of a turn.
SLICE = 1.0
# Steps by which it is found out how long one takes.
TRIED = 20
TICKS = os.sysconf("SC_CLK_TCK")

# 19,520 parameters of an adapter of all linear layers a rank.
SHAPE = {
    "model_type": "llama", "hidden_act": "silu", "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4,
    "num_attention_heads": 8, "vocab_size": 512, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}


class Fleet:
    """A coordinator, its agents, and a sweep that they have begun. It stands still but in its turns."""

    def __init__(self, folder, sweep, ending):
        folder.mkdir()
        self.folder = folder
        # Threads that wait for each other spin, the more the busier the machine is: that is no cost of checkpoints.
        self.programs = Programs(folder, ending, RAYON_NUM_THREADS="1", LORAFLEET_LOG="warn")
        # A lease that outlives turns of others.
        listen = ["--listen", "127.0.0.1:0", "--assignment-lease", "60", "--data-dir", "data"]
        self.coordinator = self.programs.start("coordinator", *listen, stdout=subprocess.PIPE, text=True)
        line = self.coordinator.stdout.readline()
        assert line.startswith("listening on "), f"the coordinator said {line!r}"
        self.endpoint = line.split()[-1]
        self.agents, self.pages = [], []
        for number in range(-(-sweep["search"]["max_trials"] // PACK)):
            page = f"127.0.0.1:{free_port()}"
            options = ["--devices", "cpu", "--data-dir", f"agent-{number}", "--spot-notice", "off", "--http", page]
            self.agents.append(self.programs.start("gpu-agent", "--coordinator", self.endpoint, *options))
            self.pages.append(page)
        until("the agents", lambda: sum(a["connected"] for a in self.lorafleet("agents", "list")) == len(self.agents))
        (folder / "sweep.yaml").write_text(json.dumps(sweep))
        self.sweep = self.lorafleet("submit", "sweep.yaml", "--data", "in-place")["id"]
        self.trained = 0.0
        self.signal(signal.SIGSTOP)

    def lorafleet(self, *arguments):
        return json.loads(self.programs.output(self.programs.binary, *arguments, "--endpoint", self.endpoint, "-o", "json"))

    def signal(self, number):
        for process in [self.coordinator, *self.agents]:
            assert process.poll() is None, f"{process.args[0]} ended with {process.returncode}"
            process.send_signal(number)

    def turn(self):
        """Goes on for a turn. Whether the sweep is over."""
        self.signal(signal.SIGCONT)
        time.sleep(SLICE)
        before, self.trained = self.trained, sum(training_cpu(agent.pid) for agent in self.agents)
        # It is asked only if it seems to be, since whoever asks takes time from it.
        over = self.trained == before and self.lorafleet("get", self.sweep)["state"] != "running"
        if not over:
            self.signal(signal.SIGSTOP)
        return over

    def figures(self, trials, steps, ways):
        """Its numbers, once it is over, where so many ways had their turns."""
        for trial in self.lorafleet("trials", "list", self.sweep):
            assert trial["state"] == "completed" and trial["step"] == steps, trial
        said = [urllib.request.urlopen(f"http://{page}/metrics", timeout=PATIENCE).read().decode() for page in self.pages]

        def total(name, *labels):
            return sum(value for text in said for value in series(text, name, labels))

        in_steps = total("lorafleet_step_duration_seconds_sum")
        # From when a state was taken until it was written, by a thread that does not train.
        making, made = (
            total(f"lorafleet_trial_phase_duration_seconds_{part}", 'phase="checkpoint"') for part in ["sum", "count"])
        agents = sum(cpu(f"/proc/{agent.pid}/stat") for agent in self.agents)
        seconds = {
            "training_cpu_seconds": self.trained,
            # The others had their turns meanwhile.
            "training_seconds": in_steps / ways,
            "agents_other_cpu_seconds": agents - self.trained,
            "coordinator_cpu_seconds": cpu(f"/proc/{self.coordinator.pid}/stat"),
        }
        uploaded = total("lorafleet_checkpoint_size_bytes_count")
        adapters = self.folder.glob("data/artifacts/sweeps/*/*/adapter-*/adapter_model.safetensors")
        return {
            **{name: value / (trials * steps) for name, value in seconds.items()},
            "seconds_of_one_checkpoint": making / ways / made,
            "seconds": in_steps / ways / len(self.agents),
            "pack_step_seconds": in_steps / ways / total("lorafleet_step_duration_seconds_count"),
            "checkpoints_made": made,
            "checkpoints_arrived": uploaded,
            "checkpoint_bytes": total("lorafleet_checkpoint_size_bytes_sum") / uploaded,
            "adapter_bytes": max(adapter.stat().st_size for adapter in adapters),
        }


def write_base(folder, tokenizer):
    """A model directory of random weights, with another model's tokenizer."""
    folder.mkdir()
    for file in tokenizer.glob("*token*"):
        shutil.copy(file, folder)
    (folder / "config.json").write_text(json.dumps(SHAPE))
    width, inner = SHAPE["hidden_size"], SHAPE["intermediate_size"]
    shapes = {"model.embed_tokens": [SHAPE["vocab_size"], width], "model.norm": [width]}
    for layer in range(SHAPE["num_hidden_layers"]):
        of = f"model.layers.{layer}"
        shapes |= {f"{of}.self_attn.{name}_proj": [width, width] for name in "qkvo"}
        shapes |= {f"{of}.mlp.{name}_proj": [inner, width] for name in ["gate", "up"]} | {f"{of}.mlp.down_proj": [width, inner]}
        shapes |= {f"{of}.{name}_layernorm": [width] for name in ["input", "post_attention"]}
    drawn, header, data = random.Random(0), {}, bytearray()
    for name, shape in shapes.items():
        values = (drawn.gauss(0, 0.02) for _ in range(math.prod(shape))) if len(shape) > 1 else [1.0] * shape[0]
        begin = len(data)
        data += array.array("f", values).tobytes()
        header[f"{name}.weight"] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, len(data)]}
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)


def cpu(stat):
    """CPU seconds that a process, its ended threads included, or a thread has used."""
    fields = pathlib.Path(stat).read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def training_cpu(process):
    """CPU seconds of the threads that train: the engine's, and those that it has started, which have its name."""
    threads = pathlib.Path(f"/proc/{process}/task").iterdir()
    return sum(cpu(thread / "stat") for thread in threads if (thread / "comm").read_text().startswith("engine"))


def series(text, name, labels):
    """The values of a metric's series that have these labels."""
    for found in re.finditer(rf"^{name}(?:\{{(.*)\}})? (\S+)", text, re.M):
        if all(label in (found[1] or "") for label in labels):
            yield float(found[2])


def measure(folder, number, sweeps, trials, steps):
    """Runs a fleet each way, in turn: its numbers.

    A machine whose speed drifts, or that others use, drifts for all of them alike. A turn of one that has ended is waited for
    too, so that time passes as fast for the other one.
    """
    with contextlib.ExitStack() as ending:
        fleets = {way: Fleet(folder / f"{way}-{number}", sweep, ending) for way, sweep in sweeps.items()}
        result = {}
        while len(result) < len(fleets):
            for way, fleet in fleets.items():
                if way in result:
                    time.sleep(SLICE)
                elif fleet.turn():
                    result[way] = fleet.figures(trials, steps, len(fleets))
                    fleet.signal(signal.SIGSTOP)
    for way in sweeps:
        cost = {name: f"{result[way][name] * 1e3:.3f} ms" for name in COSTS}
        print(f"{way:>8}  {cost}, {result[way]['checkpoints_arrived']:.0f} checkpoints", file=sys.stderr)
    return {way: result[way] for way in sweeps}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each way (default 3)")
    parser.add_argument("--trials", type=int, default=16, help="trials that train at a time (default 16)")
    parser.add_argument("--every", type=float, default=10, help="seconds between two checkpoints of a trial (default 10)")
    parser.add_argument("--checkpoints", type=int, default=6, help="checkpoints of a trial before its last (default 6)")
    parser.add_argument("--rank", type=int, default=128, help="of the adapters (default 128: 10 MB)")
    parser.add_argument("--tokenizer", type=pathlib.Path, default=SHARED / "data/models/stories260K-hf", help="of up to 512 tokens")
    parser.add_argument("--data", type=pathlib.Path, default=SHARED / "data/instruct/instruct_500_guanaco.jsonl")
    parser.add_argument("--dir", help="a folder on the disk to use")
    parser.add_argument("--out", type=pathlib.Path, help="write the JSON to this file too")
    args = parser.parse_args()
    if "LORAFLEET" not in os.environ:
        build("--workspace")

    def sweep(base, steps, save_steps):
        return {
            "name": "adapters", "pretrained_model_id": str(base), "dataset_name": str(args.data.resolve()),
            "max_steps": steps, "save_steps": save_steps, "logging_steps": 10, "eval_size": 2, "batch_size": 1,
            "max_sequence_length": 64, "lora_rank": args.rank, "search": {"algorithm": "random", "max_trials": args.trials, "seed": 1},
            "parameters": {"learning_rate": {"log_uniform": [1e-6, 1e-5]}},
        }

    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        folder = pathlib.Path(folder)
        base = folder / "base"
        write_base(base, args.tokenizer)
        tried = measure(folder, "tried", {"without": sweep(base, TRIED, 0)}, args.trials, TRIED)
        save_steps = max(1, round(args.every / tried["without"]["pack_step_seconds"]))
        # Both ways checkpoint at the end. It comes a step after the others, so that none of them is it.
        steps = args.checkpoints * save_steps + 1
        sweeps = {"without": sweep(base, steps, 0), "with": sweep(base, steps, save_steps)}
        rounds = [measure(folder, number, sweeps, args.trials, steps) for number in range(args.rounds)]

    def ratios(name):
        found = sorted(each["with"][name] / each["without"][name] for each in rounds)
        return {"median": statistics.median(found), "min": found[0], "max": found[-1]}

    found = {name: ratios(name) for name in COSTS}
    # What was made while its forerunner was on its way took its place, and was not streamed.
    arrived = all(each[way]["checkpoints_arrived"] == each[way]["checkpoints_made"] for each in rounds for way in each)
    tell({
        "benchmark": "adapters",
        "date": datetime.date.today().isoformat(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "system": platform.release(),
        "command": " ".join(["tests/bench/adapters.py", *sys.argv[1:]]),
        "trials": args.trials,
        "steps": steps,
        "save_steps": save_steps,
        "seconds_between_checkpoints": statistics.median(each["with"]["seconds"] for each in rounds) / args.checkpoints,
        "median": {way: {name: statistics.median(each[way][name] for each in rounds) for name in rounds[0][way]} for way in sweeps},
        "ratio_to_without": found,
        "every_checkpoint_arrived": arrived,
        "target": {name: TARGET for name in COSTS},
        # Said where no round says otherwise.
        "reached": {name: arrived and found[name]["max"] <= TARGET for name in COSTS},
        "rounds": rounds,
    }, args.out)


main()
