#!/usr/bin/env python3
"""Runs a fleet on three hosts, as docs/fleet.md shows it: three network namespaces that a bridge joins.

The lines of the page's section "Three hosts on one machine" are run as they stand there: etcd and a coordinator on the first host,
an agent on each of the others. Then sweeps of a real model train, and it is checked that both agents train; that nobody can
connect to an agent; that an agent that is cut off (from all, from the coordinator alone, from etcd alone) loses its trials in time
or keeps them, as the page says, and comes back; and that a coordinator that is started again interrupts no trial.

    tests/tools/hosts.py          # the base and the rows in ../shared (or LORAFLEET_SHARED), else the quickstart's
    tests/tools/hosts.py --model DIR --data FILE

Namespaces, processes and files are in namespaces of its own (unshare, as root or as a user), and gone with it, however it ends.
Where the system allows none, or ip or etcd is missing (Debian: apt-get install iproute2 etcd-server), that is told as SKIPPED
and nothing fails. LORAFLEET names another binary than target/release/lorafleet; coordinator and gpu-agent are beside it.
"""

import argparse
import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/bench"))
from common import PATIENCE, Programs, base_and_rows, build, until  # noqa: E402

PAGE = ROOT / "docs/fleet.md"
SECTION = "## Three hosts on one machine"
# A file system of its own, where ip keeps its namespaces.
RUN = pathlib.Path("/var/run")
# The ways to namespaces of one's own: as root, and as a user where the system allows that.
UNSHARE = ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
WAYS = [UNSHARE, [*UNSHARE, "--user", "--map-root-user"]]
# What is made of namespaces.
PROBE = f"""mount -t tmpfs tmpfs {RUN} && ip netns add probe && ip netns exec probe true && ip link add bridge type bridge &&
ip link add one type veth peer name eth0 netns probe && ip -n probe rule add ipproto tcp dport 1 blackhole"""

ENDPOINT = "http://10.0.0.2:7401"
AGENTS = ["one", "two"]
# As many trials as both agents hold together.
EIGHT = {"lora_rank": [2, 4, 8, 16], "learning_rate": [1e-3, 1e-4]}
# Seconds: the coordinator's --assignment-lease unless told otherwise, and what may pass beyond it.
LEASE, BEYOND = 10, 5
# As /proc/net has them: a state, and this host's own addresses, of IPv4, IPv6 and the one within the other.
LISTENS = "0A"
LOOPBACK = ["0100007F", "0" * 24 + "01000000", "0" * 16 + "FFFF00000100007F"]

# What is cut, by what, and whether the trial goes on elsewhere. The page shows these lines for the host `two`.
CUTS = [
    ("from everybody", "ip link set to-two down", "ip link set to-two up", True),
    (
        "from the coordinator alone",
        "ip -n two rule add ipproto tcp dport 7401 blackhole",
        "ip -n two rule del ipproto tcp dport 7401 blackhole",
        True,
    ),
    (
        "from etcd alone",
        "ip -n two rule add ipproto tcp dport 2379 blackhole",
        "ip -n two rule del ipproto tcp dport 2379 blackhole",
        False,
    ),
]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model, data = base_and_rows()
    parser.add_argument("--model", type=pathlib.Path, default=model, help=f"the base (default {model})")
    parser.add_argument("--data", type=pathlib.Path, default=data, help=f"the rows (default {data})")
    parser.add_argument("--within", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.within:
        within(args)
        return
    way = available()
    if way is None:
        return
    if "LORAFLEET" not in os.environ:
        build("--workspace")
    os.execvp(way[0], [*way, sys.executable, __file__, "--within", *sys.argv[1:]])


def available():
    """How to get namespaces of one's own, or nothing, with a line that says what is missing."""
    packages = {"ip": "iproute2", "etcd": "etcd-server", "unshare": "util-linux"}
    missing = [package for program, package in packages.items() if shutil.which(program) is None]
    why = f"{', '.join(missing)} not there (Debian: apt-get install {' '.join(missing)})" if missing else None
    if why is None:
        for way in WAYS:
            if subprocess.run([*way, "sh", "-c", PROBE], capture_output=True).returncode == 0:
                return way
        why = "this machine lets no test make network namespaces (unshare -mnp, -rmnp)"
    skipped = f"SKIPPED: {why}: the fleet on three hosts of docs/fleet.md is not run"
    with open(os.environ.get("LORAFLEET_SKIPPED", "/dev/stderr"), "a") as told:
        print(skipped, file=told)
    return None


def within(args):
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", RUN], check=True)
    folder = RUN / "fleet"
    folder.mkdir()
    # Whoever ends it ends the programs that it started too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with contextlib.ExitStack() as ending:
        Fleet(folder, ending).show(args.model.resolve(), args.data.resolve())


def page():
    """The section's blocks, by the word behind `sh`, and the whole of it."""
    text = PAGE.read_text()
    assert SECTION in text, f"{PAGE} has no section {SECTION!r}"
    section = re.split(r"^## ", text.split(SECTION + "\n")[1], flags=re.M)[0]
    blocks = re.findall(r"^```sh(?: (\w+))?\n(.*?)^```$", section, flags=re.M | re.S)
    names = [name for name, _ in blocks]
    assert names == ["network", "head", "head", "one", "two", "ask"], f"{SECTION} has the blocks {names}"
    return blocks, section


class Fleet:
    """Three hosts, and what runs on them."""

    def __init__(self, folder, ending):
        self.folder = folder
        # Asked again and again, as people do not.
        self.programs = Programs(folder, ending, LORAFLEET_LOG="warn", LORAFLEET_MAX_CALLS_PER_SECOND="100000")
        self.running = {}
        self.blocks, self.section = page()
        for what, cut, mend, _ in CUTS:
            assert cut in self.section and mend in self.section, f"{PAGE} does not show how a host is cut {what}: {cut}"

    def show(self, model, data):
        (_, network), (_, etcd), (_, coordinator), *agents, (_, ask) = self.blocks
        self.shell(network)
        self.serve("head", etcd)
        until("etcd", lambda: 2379 in self.listeners("head"))
        self.serve("head", coordinator)
        until("the coordinator to lead", self.leads)
        for host, agent in agents:
            self.serve(host, agent)
        until("two agents", lambda: [agent["state"] for agent in self.agents()] == ["connected"] * 2)
        self.ids = {host: (self.folder / host / "agent-id").read_text().strip() for host in AGENTS}
        self.nobody_connects_to_agents()
        self.sweep = {
            "name": "hosts", "pretrained_model_id": str(model), "dataset_name": str(data), "batch_size": 1,
            "max_sequence_length": 64, "eval_size": 2, "logging_steps": 1, "save_steps": 5, "search": {"algorithm": "grid"},
        }
        self.both_train(ask)
        for cut in CUTS:
            self.is_cut(*cut)
        self.starts_again(coordinator)
        for host in [*AGENTS, "coordinator"]:
            self.stop(self.running[host])

    def shell(self, lines):
        self.programs.output("bash", "-euc", lines, stdout=None)

    def serve(self, host, block):
        """Starts the one program that a block has, as it would be on its host."""
        line, background = re.fullmatch(r"(.*\S)( &)\n", block.replace("\\\n", " "), flags=re.S).groups()
        assert background and "\n" not in line, f"{block!r} is to start one program"
        name = line.split()[0]
        command = ["ip", "netns", "exec", host, "bash", "-c", f"exec {line}"]
        program = self.programs.start(*command, said=f"{host}.{name}.log")
        self.running[host if host in AGENTS else name] = program
        return program

    def stop(self, program):
        program.send_signal(signal.SIGTERM)
        assert program.wait(PATIENCE) == 0, f"{program.args[-1]} ended with {program.returncode}"

    def lorafleet(self, *arguments):
        """What a verb says on the first host."""
        for name, program in self.running.items():
            if program.poll() is not None:
                logs = "".join(log.read_text(errors="replace") for log in self.folder.glob(f"*{name}*.log"))
                raise SystemExit(f"{name} ended with {program.returncode}:\n{logs}")
        command = ["ip", "netns", "exec", "head", "lorafleet", *arguments, "-o", "json", "--endpoint", ENDPOINT]
        return json.loads(self.programs.output(*command))

    def leads(self):
        """Whether the coordinator answers, and does not stand by."""
        command = ["ip", "netns", "exec", "head", "lorafleet", "list", "-o", "json", "--endpoint", ENDPOINT]
        try:
            self.programs.output(*command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        except subprocess.CalledProcessError:
            return False
        return True

    def agents(self):
        return self.lorafleet("agents", "list")

    def agent(self, host):
        [agent] = [agent for agent in self.agents() if agent["id"] == self.ids[host]]
        return agent

    def listeners(self, host, kinds=("tcp", "tcp6")):
        """Ports of a host at which something listens for others."""
        ports = set()
        for kind in kinds:
            command = ["ip", "netns", "exec", host, "cat", f"/proc/net/{kind}"]
            table = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            for row in table.splitlines()[1:]:
                _, local, _, state, *_ = row.split()
                address, port = local.split(":")
                if (state == LISTENS or kind.startswith("udp")) and address not in LOOPBACK:
                    ports.add(int(port, 16))
        return ports

    def nobody_connects_to_agents(self):
        equal(self.listeners("head"), {2379, 7401}, "ports of the first host")
        for host in AGENTS:
            equal(self.listeners(host, ("tcp", "tcp6", "udp", "udp6")), set(), f"ports of {host}")
        print("agents dial out only: nothing listens on their hosts")

    def write(self, parameters, steps):
        sweep = {**self.sweep, "max_steps": steps, "parameters": parameters}
        (self.folder / "sweep.yaml").write_text(json.dumps(sweep))

    def submit(self, parameters, steps):
        self.write(parameters, steps)
        return self.lorafleet("submit", "sweep.yaml")["id"]

    def trials(self, sweep):
        return self.lorafleet("trials", "list", sweep)

    def ended(self, sweep, steps):
        """Waits for a sweep's end: every trial came to it, at its first attempt, and both agents trained."""
        watched = self.lorafleet("watch", sweep)
        equal(watched["sweep"]["state"], "completed", sweep)
        for trial in watched["trials"]:
            equal((trial["state"], trial["step"], trial["attempt"]), ("completed", steps, 1), trial["id"])
            self.whole_curve(trial["id"])
        equal({trial["agent"] for trial in watched["trials"]}, set(self.ids.values()), "agents that trained")
        return len(watched["trials"])

    def whole_curve(self, trial):
        """A value a step, and no gap."""
        steps = [point["step"] for point in self.lorafleet("trials", "metrics", trial)]
        equal(steps, list(range(len(steps))), f"steps of {trial}")
        return len(steps) - 1

    def both_train(self, ask):
        self.write(EIGHT, 20)
        said = self.programs.output("ip", "netns", "exec", "head", "bash", "-euc", ask)
        # It is submitted first, and its id is all that is said of that.
        count = self.ended(said.splitlines()[0], 20)
        # What has the base in memory is preferred; of two that are known to, each gets a trial.
        until("both to say that they hold the base", lambda: all(
            device["resident_base"] for agent in self.agents() for device in agent["devices"]))
        print(f"{count} trials trained, on both agents")

    def is_cut(self, what, cut, mend, moves):
        # Ended by a person, so that it lasts as long as it has to.
        sweep = self.submit({"lora_rank": [2, 4]}, 1_000_000)
        one, two = (self.ids[host] for host in AGENTS)

        def of(agent):
            return [trial for trial in self.trials(sweep) if trial["agent"] == agent]

        def get():
            return self.lorafleet("trials", "get", trial["id"])

        def trains(trial, step):
            return trial["step"] > step and trial["resume"] is not None

        until("a trial on each agent that is checkpointed", lambda: all(
            any(trains(trial, 10) for trial in of(agent)) for agent in [one, two]))
        [trial] = of(two)
        [other] = of(one)
        self.shell(cut)
        since = time.monotonic()
        if moves:
            until("another attempt", lambda: get()["attempt"] > 1)
            took = time.monotonic() - since
            moved = get()
            equal((moved["attempt"], moved["agent"]), (2, one), f"{trial['id']} cut {what}")
            [[_, zero], [_, start]] = moved["attempts"]
            log = self.lorafleet("trials", "logs", trial["id"])
            stored = [int(re.search(r"of step (\d+)", line["message"])[1]) for line in log
                      if line["event"] == "checkpoint" and line["attempt"] == 1]
            equal((zero, start), (0, stored[-1]), f"step from which {trial['id']} goes on")
            assert start >= trial["resume"][1], f"{start} is before {trial['resume']}"
            assert took <= LEASE + BEYOND, f"{trial['id']} was placed again after {took:.1f} s"
            told = f"its trial goes on at the other from step {start} after {took:.1f} s"
            until("training there", lambda: trains(get(), start + 10))
            wanted = "registered" if "coordinator" in what else "gone"
            until(f"the agent to be {wanted}", lambda: self.agent("two")["state"] == wanted)
        else:
            until("its entry in etcd to end", lambda: not self.agent("two")["registered"])
            equal(self.agent("two")["state"], "connected", "the agent")
            told = "its trial goes on there"
            step = get()["step"]
            until("training there", lambda: trains(get(), step))
        self.shell(mend)
        until("the agent to come back", lambda: self.agent("two")["connected"] and self.agent("two")["registered"])
        until("it to hold what is its own", lambda: self.agent("two")["trials"] == [t["id"] for t in of(two)])
        # What it has said late does not count.
        for number in [trial["id"], other["id"]]:
            self.whole_curve(number)
        attempts = {each["id"]: each["attempt"] for each in self.trials(sweep)}
        equal(attempts, {trial["id"]: 2 if moves else 1, other["id"]: 1}, "attempts")
        self.lorafleet("cancel", sweep)
        equal(self.lorafleet("watch", sweep)["sweep"]["state"], "cancelled", sweep)
        until("the agents to be free", lambda: not any(agent["trials"] for agent in self.agents()))
        print(f"an agent is cut {what}: {told}; it comes back")

    def starts_again(self, coordinator):
        before = self.lorafleet("list")
        sweep = self.submit(EIGHT, 300)
        until("training", lambda: all(trial["step"] > 10 for trial in self.trials(sweep)))
        self.stop(self.running["coordinator"])
        self.serve("head", coordinator)
        until("the coordinator to lead", self.leads)
        states = [trial["state"] for trial in self.trials(sweep)]
        assert "running" in states, f"the coordinator was away too late: {states}"
        count = self.ended(sweep, 300)
        kept = [each for each in self.lorafleet("list") if each["id"] != sweep]
        equal(kept, before, "earlier sweeps")
        print(f"the coordinator was started again: {count} trials trained on, on both agents")


def equal(got, want, what):
    assert got == want, f"{what}: {got!r}, not {want!r}"


main()
