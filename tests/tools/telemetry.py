#!/usr/bin/env python3
"""Has a real collector and a real Prometheus receive what a fleet on this machine tells: rotel over OTLP gRPC, Prometheus by
scraping /metrics.

A small sweep trains under `lorafleet up`. What rotel received must have every span of a trial's trace, the metrics with their
units, and each line of the trials' logs; Prometheus must hold the series, take the alert rules and answer every query of the
dashboards. Then simulated devices make 10,000 trials, which must have no more series than a hundred. rotel is installed into a virtual environment under target/ (10 MB, once); where it or Prometheus (Debian: apt-get
install prometheus) cannot be had, that is told as SKIPPED and nothing fails. LORAFLEET names another binary than
target/release/lorafleet.
"""

import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.parse
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/bench"))
from common import PATIENCE, Programs, build, free_port, python_with, run, until  # noqa: E402

ROTEL = ["rotel==0.0.1a15"]
OTEL = ROOT / "config/otel"

SWEEP = {
    "name": "observed",
    "pretrained_model_id": str(ROOT / "config/quickstart/base"),
    "dataset_name": str(ROOT / "config/quickstart/instruct.jsonl"),
    "eval_size": 2, "batch_size": 1, "max_sequence_length": 32,
    "max_steps": 40, "save_steps": 10, "eval_steps": 20, "logging_steps": 1,
    "search": {"algorithm": "grid"},
    "parameters": {"lora_rank": [2, 4]},
}

# As page.py has it: a step that takes no time.
MODEL = {
    "model_type": "llama", "hidden_act": "silu", "hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 5,
    "num_attention_heads": 8, "vocab_size": 512, "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
SIMULATED = {
    "name": "many", "pretrained_model_id": "./model", "dataset_name": "nobody/rows", "compute_dtype": "float16",
    "max_steps": 1, "batch_size": 1, "max_sequence_length": 32, "search": {"algorithm": "random", "seed": 1},
    "parameters": {"learning_rate": {"log_uniform": [1e-5, 1e-3]}, "lora_rank": [4, 8, 16]},
}

# Of each trial's trace.
SPANS = [
    "trial", "queue", "attempt", "place", "prepare", "train", "evaluate", "checkpoint", "checkpoint.upload",
    "lorafleet.v1.AgentService/UploadCheckpoint",
]
METRICS = {
    "lorafleet.trials": "{trial}",
    "lorafleet.agents": "{agent}",
    "lorafleet.trial.attempts": "{attempt}",
    "lorafleet.trial.queue.duration": "s",
    "lorafleet.store.transaction.duration": "s",
    "lorafleet.step.duration": "s",
    "lorafleet.trial.throughput.tokens": "{token}/s",
    "lorafleet.checkpoint.size": "By",
    "lorafleet.telemetry.exported": "{item}",
    "rpc.server.call.duration": "s",
    "process.cpu.time": "s",
    "process.memory.usage": "By",
}
# As Prometheus has them, once both trials are over.
SERIES = {
    'up{job="lorafleet"}': 1,
    'sum(lorafleet_agents{state="connected"})': 1,
    'sum(lorafleet_trial_attempts_total{outcome="completed"})': 2,
    "sum(lorafleet_trial_queue_duration_seconds_count)": 2,
    'sum(lorafleet_trial_phase_duration_seconds_count{phase="load"})': None,
    "sum(lorafleet_step_duration_seconds_count)": None,
    "sum(lorafleet_trial_throughput_tokens_per_second_sum)": None,
    "sum(lorafleet_checkpoint_size_bytes_count)": None,
    'sum(lorafleet_store_transaction_duration_seconds_count{outcome="durable"})': None,
    'sum(rpc_server_call_duration_seconds_count{rpc_method="lorafleet.v1.SweepService/SubmitSweep"})': 1,
    "process_cpu_time_seconds_total": None,
    "process_memory_usage_bytes": None,
    "target_info": None,
}


def main():
    rotel = available()
    if rotel is None:
        return
    run(["promtool", "check", "rules", OTEL / "alerts.yaml"])
    run(["promtool", "test", "rules", OTEL / "alerts.test.yaml"])
    if "LORAFLEET" not in os.environ:
        build()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as ending:
        observe(Programs(pathlib.Path(folder), ending), rotel)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as ending:
        series_have_an_end(Programs(pathlib.Path(folder), ending))


def available():
    """rotel's program, or nothing, with a line that says what is missing."""
    missing = [name for name in ["prometheus", "promtool"] if shutil.which(name) is None]
    why = f"{', '.join(missing)} not there (Debian: apt-get install prometheus)" if missing else None
    try:
        python = python_with("telemetry-venv", ROTEL)
        where = "import pathlib, rotel; print(pathlib.Path(rotel.__file__).with_name('rotel-agent'))"
        rotel = subprocess.run([python, "-c", where], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    except subprocess.CalledProcessError:
        why = f"{', '.join(ROTEL)} cannot be installed"
    if why is None:
        return rotel
    skipped = f"SKIPPED: {why}: telemetry is not received by other programs"
    with open(os.environ.get("LORAFLEET_SKIPPED", "/dev/stderr"), "a") as told:
        print(skipped, file=told)
    return None


def observe(programs, rotel):
    folder = programs.folder
    otlp, otlp_http, scraped, prometheus = (free_port() for _ in range(4))
    debug = [word for signal_ in ["traces", "metrics", "logs"] for word in ["--debug-log", signal_]]
    collector = programs.start(
        rotel, "start", "--exporter", "blackhole", *debug, "--debug-log-verbosity", "detailed", "--pid-file", "pid",
        "--otlp-grpc-endpoint", f"127.0.0.1:{otlp}", "--otlp-http-endpoint", f"127.0.0.1:{otlp_http}", said="received",
    )
    until("the collector", lambda: listens(otlp))

    rules = json.dumps(str(OTEL / "alerts.yaml"))
    (folder / "prometheus.yaml").write_text(f"""
global: {{ scrape_interval: 500ms, scrape_timeout: 500ms, evaluation_interval: 1s }}
rule_files: [{rules}]
scrape_configs:
  - job_name: lorafleet
    static_configs: [{{ targets: ["127.0.0.1:{scraped}"] }}]
""")
    programs.start(
        "prometheus", "--config.file=prometheus.yaml", "--storage.tsdb.path=tsdb",
        f"--web.listen-address=127.0.0.1:{prometheus}", said="prometheus.log",
    )

    def ask(path, **query):
        address = f"http://127.0.0.1:{prometheus}{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(address, timeout=PATIENCE) as answer:
            found = json.load(answer)
        assert found["status"] == "success", found
        return found["data"]

    server = serve(programs, scraped, variables={
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{otlp}", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
        "OTEL_METRIC_EXPORT_INTERVAL": "1000",
    })
    (folder / "sweep.yaml").write_text(json.dumps(SWEEP))
    sweep = asked(programs, "submit", "sweep.yaml")["id"]
    asked(programs, "watch", sweep)
    trials = asked(programs, "trials", "list", sweep)
    assert [trial["state"] for trial in trials] == ["completed"] * 2, trials
    logs = {trial["id"]: asked(programs, "trials", "logs", trial["id"]) for trial in trials}

    prometheus_holds(ask)
    # It sends what it still has, and so does the collector.
    for process in [server, collector]:
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0, f"{process.args[0]} ended with {process.returncode}"
    rotel_received((folder / "received").read_text(errors="replace"), trials, logs)


def serve(programs, http, *flags, **options):
    """A server in the folder, with metrics at that port."""
    up = ["up", "--listen", "127.0.0.1:0", "--http", f"127.0.0.1:{http}", "--data-dir", "data", *flags]
    server = programs.start(programs.binary, *up, said="up.log", **options)
    until("the server", lambda: (programs.folder / "data/endpoint").exists())
    return server


def asked(programs, *arguments):
    """What a command says of the server in the folder. It takes as long as what it waits for."""
    return json.loads(programs.output(programs.binary, *arguments, "--data-dir", "data", "-o", "json", timeout=None))


def series_have_an_end(programs):
    """Ten thousand trials have no more series than a hundred: what the programs really tell, by their own calls."""
    folder, http = programs.folder, free_port()
    (folder / "model").mkdir()
    (folder / "model/config.json").write_text(json.dumps(MODEL))
    serve(programs, http, "--simulate", "A100-40GB:8", "--simulate-speed", "100000")

    def series_after(count):
        (folder / "sweep.yaml").write_text(json.dumps({**SIMULATED, "search": {**SIMULATED["search"], "max_trials": count}}))
        sweep = asked(programs, "submit", "sweep.yaml")["id"]
        asked(programs, "watch", sweep)
        with urllib.request.urlopen(f"http://127.0.0.1:{http}/metrics", timeout=PATIENCE) as answer:
            text = answer.read().decode()
        assert sweep not in text, f"a series is named after {sweep}"
        return {line.rsplit(" ", 1)[0] for line in text.splitlines() if not line.startswith("#")}

    few, many = series_after(100), series_after(10_000)
    # A call or an outcome that had not been before has series of its own, a histogram's some fifteen.
    assert len(many - few) <= 64, f"{len(few)} series, then {len(many)}: {sorted(many - few)[:100]}"
    print(f"10,000 trials have {len(many)} series, 100 had {len(few)}")


def prometheus_holds(ask):
    until("Prometheus", lambda: attempt(lambda: ask("/api/v1/query", query="up")) is not None)
    for query, want in SERIES.items():
        def value():
            return [float(series["value"][1]) for series in ask("/api/v1/query", query=query)["result"]]

        until(f"{query} is {want or 'there'}", lambda: value() == [want] if want else any(v > 0 for v in value()))
    print(f"Prometheus holds {len(SERIES)} series that were asked for")

    # The rules run, and every panel asks what Prometheus understands.
    def rules():
        groups = ask("/api/v1/rules")["groups"]
        return [rule for group in groups for rule in group["rules"]]

    until("the rules to be evaluated", lambda: all(rule["health"] == "ok" for rule in rules()))
    count = sum(line.lstrip().startswith("- alert:") for line in (OTEL / "alerts.yaml").read_text().splitlines())
    assert len(rules()) == count, f"{len(rules())} rules of {count}"
    queries = 0
    for board in sorted((OTEL / "grafana").glob("*.json")):
        for panel in json.loads(board.read_text())["panels"]:
            for target in panel.get("targets", []):
                if "expr" in target:
                    ask("/api/v1/query", query=target["expr"].replace("$__rate_interval", "5m"))
                    queries += 1
    assert queries > 20, queries
    print(f"Prometheus evaluates {count} rules and {queries} queries of the dashboards")


def rotel_received(text, trials, logs):
    """What rotel printed of what it received."""
    records = {"Span": [], "LogRecord": [], "Metric": []}
    for part in re.split(r"^(?=(?:Span|LogRecord|Metric) #\d+)", text, flags=re.M):
        if kind := re.match(r"(Span|LogRecord|Metric) #", part):
            records[kind[1]].append(part)

    def field(record, name):
        found = re.search(rf"^\s*(?:-> )?{re.escape(name)}\s*: ?(.*)$", record, flags=re.M)
        return found and found[1].strip()

    units = {field(metric, "Name"): field(metric, "Unit") for metric in records["Metric"]}
    for name, unit in METRICS.items():
        assert units.get(name) == unit, f"{name} is in {units.get(name)!r}, not {unit!r}; there are {sorted(units)}"
    for trial in trials:
        trace = trial["trace_id"]
        names = {field(span, "Name") for span in records["Span"] if field(span, "Trace ID") == trace}
        assert names.issuperset(SPANS), f"{trial['id']}: {set(SPANS) - names} are not in its trace, but {names}"
        of_trial = [
            (field(log, "lorafleet.trial.event"), field(log, "Body"))
            for log in records["LogRecord"]
            if field(log, "EventName") == "lorafleet.trial.log" and field(log, "Trace ID") == trace
        ]
        want = [(f"Str({line['event']})", f"Str({line['message']})") for line in logs[trial["id"]]]
        assert of_trial == want, f"{trial['id']}: {of_trial}, not {want}"
    lines = sum(map(len, logs.values()))
    print(f"rotel received {len(units)} metrics, {len(records['Span'])} spans, {lines} lines of {len(trials)} trials' logs")


def listens(port):
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def attempt(work):
    try:
        return work()
    except OSError:
        return None


main()
