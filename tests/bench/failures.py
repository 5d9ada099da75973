#!/usr/bin/env python3
"""How long a fleet takes after its leader or an agent was killed, and what work is lost.

etcd, two coordinators and two agents run on this machine as people start them, with the leases that they have unless told otherwise, and
one trial trains for real. In each round the leading coordinator is killed with SIGKILL at a drawn moment, and then the agent that has the
trial; who was killed is started again. Prints one JSON object, with every value and the median, of:

    fail_over_seconds     from the kill of the leader until another one leads and serves
    adopted_seconds       from there until the agent is connected to it
    interrupted_trials    trials that were given to another agent although theirs lived
    placed_again_seconds  from the kill of the agent until its trial was given to the other one
    lost_steps            steps whose metrics the coordinator had, and that were made again

and exits with 1 if another one led later than the leader's lease and 5 s, a trial was placed later than its lease and 5 s, or a
trial was interrupted by the death of a coordinator.

    tests/bench/failures.py                     # the base and the rows in ../shared (or LORAFLEET_SHARED), else the quickstart's
    tests/bench/failures.py --rounds 50 --seed 7 --out docs/benchmarks/failures.json

LORAFLEET names another binary than target/release/lorafleet; coordinator and gpu-agent are beside it. etcd must be installed.
"""

import argparse
import contextlib
import datetime
import json
import os
import pathlib
import queue
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time

from common import PATIENCE, Programs, base_and_rows, build, free_port, processor, tell, until

# Seconds: the leases of a leader and of a trial unless told otherwise, and what may pass beyond either.
TTL, LEASE, BEYOND = 10, 10, 5
# Steps between two checkpoints.
SAVE_STEPS = 50


class Coordinator:
    """One that says when it leads."""

    def __init__(self, process):
        self.process, self.said = process, queue.Queue()
        threading.Thread(target=self.read, daemon=True).start()
        self.endpoint = self.says("listening on ")[1]

    def read(self):
        for line in self.process.stdout:
            self.said.put((time.monotonic(), line.strip()))

    def says(self, beginning):
        """When it says that, and the rest of the line."""
        while True:
            at, line = self.said.get(timeout=PATIENCE)
            if line.startswith(beginning):
                return at, line.removeprefix(beginning)


class Fleet:
    def __init__(self, folder, ending):
        self.folder = folder
        # Asked again and again, as people do not.
        self.programs = Programs(folder, ending, LORAFLEET_LOG="error", LORAFLEET_MAX_CALLS_PER_SECOND="100000")
        [clients, peers] = [f"http://127.0.0.1:{free_port()}" for _ in range(2)]
        self.etcd = clients
        self.programs.start(
            "etcd", "--data-dir", "etcd", "--log-level", "error", "--listen-client-urls", clients, "--advertise-client-urls",
            clients, "--listen-peer-urls", peers, "--initial-advertise-peer-urls", peers, "--initial-cluster", f"default={peers}")
        until("etcd", lambda: listens(clients))
        self.leads = self.coordinator()
        self.leads.says("leading")
        self.stands_by = self.coordinator()
        self.agents = {}
        for name in ["one", "two"]:
            self.agent(name)

    def coordinator(self):
        options = ["--listen", "127.0.0.1:0", "--etcd", self.etcd, "--artifacts", "store"]
        return Coordinator(self.programs.start("coordinator", *options, stdout=subprocess.PIPE, text=True))

    def agent(self, name):
        options = ["--etcd", self.etcd, "--devices", "cpu", "--data-dir", name, "--spot-notice", "off"]
        process = self.programs.start("gpu-agent", *options)
        file = self.folder / name / "agent-id"
        until(f"the agent {name}", file.exists)
        self.agents[file.read_text().strip()] = (name, process)
        until("both agents", lambda: sum(agent["connected"] for agent in self.listed()) == len(self.agents))

    def lorafleet(self, *arguments):
        return json.loads(self.programs.output(
            self.programs.binary, *arguments, "--endpoint", self.leads.endpoint, "-o", "json"))

    def listed(self):
        return self.lorafleet("agents", "list")

    def submit(self, sweep):
        (self.folder / "sweep.yaml").write_text(json.dumps(sweep))
        self.trial = self.lorafleet("submit", "sweep.yaml", "--data", "in-place")["id"] + "/1"

    def get(self):
        return self.lorafleet("trials", "get", self.trial)

    def trains(self):
        """Waits until the trial has made steps beyond a checkpoint of its current attempt."""
        def is_checkpointed():
            trial = self.get()
            return trial["resume"] is not None and trial["step"] > trial["resume"][1] > trial["attempts"][-1][1]

        until("a checkpoint", is_checkpointed)

    def kill_leader(self):
        """Seconds until another leads, seconds from there until the agent is there, and whether the trial stayed."""
        before, killed_at = self.get(), time.monotonic()
        kill(self.leads.process)
        led_at, _ = self.stands_by.says("leading")
        self.leads, self.stands_by = self.stands_by, None
        until("the agent", lambda: any(a["connected"] and a["id"] == before["agent"] for a in self.listed()))
        adopted_at = time.monotonic()
        self.stands_by = self.coordinator()
        until("training", lambda: self.get()["step"] > before["step"])
        stayed = self.get()["attempt"] == before["attempt"]
        return led_at - killed_at, adopted_at - led_at, stayed

    def kill_agent(self):
        """Seconds until the other agent has the trial, and the steps that it makes again."""
        before = self.get()
        name, process = self.agents.pop(before["agent"])
        killed_at = time.monotonic()
        kill(process)
        until("another attempt", lambda: self.get()["attempt"] > before["attempt"], pause=0.02)
        placed_at = time.monotonic()
        log = self.lorafleet("trials", "logs", self.trial)
        [durable] = [line["step"] for line in log if (line["event"], line["attempt"]) == ("queued", before["attempt"])]
        lost = durable - self.get()["attempts"][-1][1]
        self.agent(name)
        return placed_at - killed_at, lost


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.wait()


def listens(address):
    host, port = address.removeprefix("http://").split(":")
    with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 1):
        return True
    return False


def spread(values):
    values = sorted(round(value, 2) for value in values)
    return {"median": round(statistics.median(values), 2), "least": values[0], "most": values[-1], "values": values}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model, data = base_and_rows()
    parser.add_argument("--rounds", type=int, default=20, help="kills of each (default 20)")
    parser.add_argument("--seed", type=int, default=1, help="by which moments are drawn (default 1)")
    parser.add_argument("--out", type=pathlib.Path, help="a file for the JSON object too")
    args = parser.parse_args()
    if shutil.which("etcd") is None:
        sys.exit("etcd is not installed (Debian: apt-get install etcd-server)")
    if "LORAFLEET" not in os.environ:
        build("--workspace")
    draws = random.Random(args.seed)
    leaders, agents = [], []
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as ending:
        fleet = Fleet(pathlib.Path(folder), ending)
        # Longer than it is looked at.
        fleet.submit({
            "name": "failures", "pretrained_model_id": str(model), "dataset_name": str(data), "batch_size": 1,
            "max_sequence_length": 64, "max_steps": 100_000_000, "eval_size": 2, "save_steps": SAVE_STEPS, "logging_steps": 10,
            "search": {"algorithm": "grid"}, "parameters": {"lora_rank": [4]},
        })
        for number in range(args.rounds):
            for killed, kill_one in [(leaders, fleet.kill_leader), (agents, fleet.kill_agent)]:
                fleet.trains()
                time.sleep(draws.uniform(0, 3))
                killed.append(kill_one())
            print(f"round {number + 1}: {leaders[-1]} {agents[-1]}", file=sys.stderr)
    fail_over, adopted, stayed = zip(*leaders)
    placed_again, lost = zip(*agents)
    interrupted = sum(not one for one in stayed)
    reached = max(fail_over) <= TTL + BEYOND and max(placed_again) <= LEASE + BEYOND and interrupted == 0
    tell({
        "date": datetime.date.today().isoformat(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "rounds": args.rounds,
        "seed": args.seed,
        "election_ttl_seconds": TTL,
        "assignment_lease_seconds": LEASE,
        "fail_over_seconds": spread(fail_over),
        "adopted_seconds": spread(adopted),
        "interrupted_trials": interrupted,
        "placed_again_seconds": spread(placed_again),
        "save_steps": SAVE_STEPS,
        "lost_steps": spread(lost),
        "goals_reached": reached,
    }, args.out)
    sys.exit(0 if reached else 1)


if __name__ == "__main__":
    main()
