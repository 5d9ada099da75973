#!/usr/bin/env python3
"""Opens what `lorafleet export` writes with the tools that it is written for: Optuna and its dashboard, TensorBoard, MLflow,
pyarrow.

A simulated sweep is run, exported in every format, and read back by each tool; what they read must be what
`lorafleet trials` says. The same must be what mirrors come to that follow another sweep while it runs, and are stopped and
started again, as its server is. The tools are installed into two virtual environments under target/ (400 MB, and 850 MB with
MLflow's server, once); where they cannot be had, that is told as SKIPPED and nothing fails. LORAFLEET names another binary than
target/release/lorafleet.
"""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/bench"))
from common import LORAFLEET, build, free_port, python_with, until  # noqa: E402

PACKAGES = ["optuna==5.0.0", "optuna-dashboard==0.21.0", "tensorboard==2.21.0", "pyarrow==26.0.1"]
# It wants an older pyarrow.
MLFLOW = ["mlflow==3.17.2"]

# Successive halving ends trials early, and a learning rate above 1 diverges.
SWEEP = """
name: exported
pretrained_model_id: ./model
dataset_name: nobody/rows
compute_dtype: float16
max_steps: 27
eval_steps: 1
search: { algorithm: asha, max_trials: 12, metric: eval/loss, min_steps: 1, reduction_factor: 3, seed: 1 }
parameters:
  learning_rate: { log_uniform: [1.0e-5, 4.0] }
  lora_rank: [4, 8, 16]
  lora_dropout: { uniform: [0.0, 0.25], step: 0.1 }
  batch_size: { integer: [1, 8], step: 2 }
  precision_mode: [float16, 4bit]
  max_sequence_length: { when: { precision_mode: 4bit }, choices: [256, 512], otherwise: 256 }
  target_modules: [[q_proj, v_proj], all-linear]
"""

# Every trial makes all its steps, whenever its server is killed, unless it diverges.
FOLLOWED = SWEEP.replace("name: exported", "name: followed").replace(
    "search: { algorithm: asha, max_trials: 12, metric: eval/loss, min_steps: 1, reduction_factor: 3, seed: 1 }",
    "save_steps: 4\nsearch: { algorithm: random, max_trials: 8, metric: eval/loss, seed: 1 }",
)

# Enough completed trials to say which parameter matters.
WEIGHED = """
name: weighed
pretrained_model_id: ./model
dataset_name: nobody/rows
compute_dtype: float16
max_steps: 8
search: { algorithm: random, max_trials: 40, seed: 3 }
parameters:
  learning_rate: { log_uniform: [1.0e-5, 1.0e-2] }
  lora_rank: [4, 8, 16, 64]
  lora_dropout: { uniform: [0.0, 0.25] }
  batch_size: { integer: [1, 7], step: 2 }
"""

MODEL = {
    "model_type": "llama", "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 5632,
    "num_hidden_layers": 22, "num_attention_heads": 32, "vocab_size": 32000, "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
}


def main():
    match sys.argv[1:]:
        case [folder]:
            check(pathlib.Path(folder))
            return
        case [folder, uri]:
            check_mlflow(pathlib.Path(folder), uri)
            return
    python, mlflow = installed("exports-venv", PACKAGES), installed("mlflow-venv", MLFLOW)
    if python is None:
        return
    if "LORAFLEET" not in os.environ:
        build()
    with tempfile.TemporaryDirectory() as folder, mlflow_server(mlflow, pathlib.Path(folder)) as uri:
        folder = pathlib.Path(folder)
        export(folder, uri)
        follow(folder, uri)
        subprocess.run([python, __file__, folder], check=True)
        if uri:
            subprocess.run([mlflow, __file__, folder, uri], check=True)


def installed(name, packages):
    """The python that has the packages, if they can be had."""
    try:
        return python_with(name, packages)
    except subprocess.CalledProcessError:
        skipped = f"SKIPPED: {', '.join(packages)} cannot be installed: exports are not opened by other tools"
        with open(os.environ.get("LORAFLEET_SKIPPED", "/dev/stderr"), "a") as told:
            print(skipped, file=told)
        return None


@contextlib.contextmanager
def mlflow_server(python, folder):
    """MLflow's server on a database of its own while it is needed: its address, or None without it."""
    if python is None:
        yield None
        return
    port = free_port()
    command = [python, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
               "--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--default-artifact-root", folder / "artifacts"]
    with open(folder / "mlflow.log", "w") as log:
        server = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True)
    uri = f"http://127.0.0.1:{port}"
    try:
        # The first start makes the tables of its database.
        for _ in range(600):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{uri}/health").close()
                break
            assert server.poll() is None, (folder / "mlflow.log").read_text()
            time.sleep(0.2)
        yield uri
    finally:
        # Its workers are processes of their own.
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()


def at(folder, data):
    """The command in a folder on a data directory there, and how to start it without waiting for its end."""
    environment = {**os.environ, "XDG_CONFIG_HOME": str(folder / "config")}

    def start(*arguments, **options):
        command = [os.environ.get("LORAFLEET", LORAFLEET), *arguments, "--data-dir", data]
        return subprocess.Popen(command, cwd=folder, env=environment, text=True, **options)

    def lorafleet(*arguments):
        command = start(*arguments, "-o", "json", stdout=subprocess.PIPE)
        output, _ = command.communicate()
        assert command.returncode == 0, f"{arguments}: {command.returncode}"
        return json.loads(output)

    return lorafleet, start


def truth(lorafleet, sweep):
    """What the server says of a sweep."""
    trials = lorafleet("trials", "list", sweep)
    curves = {trial["id"]: lorafleet("trials", "metrics", trial["id"]) for trial in trials}
    return {"sweep": lorafleet("get", sweep), "trials": trials, "curves": curves}


def export(folder, uri):
    """Runs the sweep, writes its exports, and what the server says of it."""
    (folder / "model").mkdir()
    (folder / "model/config.json").write_text(json.dumps(MODEL))
    (folder / "sweep.yaml").write_text(SWEEP)
    lorafleet, _ = at(folder, "data")
    ran = lorafleet("run", "sweep.yaml", "--simulate", "T4-16GB:4", "--simulate-speed", "20")
    sweep = ran["sweep"]["id"]
    for name in ["csv", "parquet", "optuna", "tensorboard"]:
        lorafleet("export", sweep, "--format", name, "--to", name)
    if uri:
        # Twice is as good as once.
        for _ in range(2):
            lorafleet("export", sweep, "--format", "mlflow", "--tracking-uri", uri)
    (folder / "weighed.yaml").write_text(WEIGHED)
    ran = lorafleet("run", "weighed.yaml", "--simulate", "A100-40GB:4", "--simulate-speed", "1000")
    weighed = ran["sweep"]["id"]
    lorafleet("export", weighed, "--format", "optuna", "--to", "weighed")
    lorafleet("report", weighed, "--format", "markdown", "--file", "report")
    (folder / "truth.json").write_text(json.dumps(truth(lorafleet, sweep)))


def follow(folder, uri):
    """Follows a sweep with a mirror of each format; the mirrors are stopped and started again, and its server is killed."""
    (folder / "followed.yaml").write_text(FOLLOWED)
    lorafleet, start = at(folder, "served")

    def up():
        server = start("up", "--listen", "127.0.0.1:0", "--simulate", "T4-16GB:4", "--simulate-speed", "20",
                       stderr=subprocess.PIPE)
        assert any("serving" in line for line in server.stderr), "the server ended"
        # What it says is read, so that it does not wait for a reader.
        threading.Thread(target=server.stderr.read, daemon=True).start()
        while not lorafleet("agents", "list"):
            time.sleep(0.1)
        return server

    def mirrors():
        formats = {"optuna": ["--to", "optuna.followed"], "tensorboard": ["--to", "tensorboard.followed"]}
        if uri:
            formats["mlflow"] = ["--tracking-uri", uri]
        followers = [start("export", sweep, "--follow", "--format", name, *rest, stdout=subprocess.DEVNULL,
                           stderr=subprocess.PIPE) for name, rest in formats.items()]
        for follower in followers:
            # Only what has begun to follow waits for a server that is gone.
            assert any("trial" in line for line in follower.stderr), follower.args
            threading.Thread(target=follower.stderr.read, daemon=True).start()
        return followers

    def until(steps):
        """Waits for so many steps in all, or for the sweep's end."""
        while lorafleet("get", sweep)["state"] == "running":
            if sum(trial["step"] for trial in lorafleet("trials", "list", sweep)) >= steps:
                return
            time.sleep(0.1)

    server = up()
    try:
        sweep = lorafleet("submit", "followed.yaml")["id"]
        followers = mirrors()
        until(30)
        for follower in followers:
            follower.terminate()
            follower.wait()
        until(45)
        followers = mirrors()
        until(60)
        server.kill()
        server.wait()
        server = up()
        for follower in followers:
            assert follower.wait() == 0, follower.args
        (folder / "followed.json").write_text(json.dumps(truth(lorafleet, sweep)))
    finally:
        server.kill()
        server.wait()


def check(folder):
    """Run by the virtual environment's python."""
    exported = json.loads((folder / "truth.json").read_text())
    states = [trial["state"] for trial in exported["trials"]]
    equal(len(states), 12, "trials")
    for state in ["completed", "stopped"]:
        assert state in states, f"no trial is {state}: {states}"
    # Optuna asks for one more trial at the end, which is in the journal then.
    for opened, name in [(dashboard_opens, "optuna"), (optuna_opens, "optuna"), (tensorboard_opens, "tensorboard"),
                         (pyarrow_opens, "")]:
        opened(folder / name, **exported)
        print(f"{opened.__name__}: {len(states)} trials are as they were")
    optuna_weighs(folder)
    print("optuna_weighs: parameters matter as the report says")
    followed = json.loads((folder / "followed.json").read_text())
    for opened, name in [(dashboard_opens, "optuna"), (optuna_opens, "optuna"), (tensorboard_opens, "tensorboard")]:
        opened(folder / f"{name}.followed", **followed)
        print(f"{opened.__name__}: {len(followed['trials'])} trials that were followed are as they are")


def check_mlflow(folder, uri):
    """Run by the python that has MLflow."""
    for name, again in [("truth", False), ("followed", True)]:
        said = json.loads((folder / f"{name}.json").read_text())
        mlflow_opens(uri, again, **said)
        print(f"mlflow_opens: {len(said['trials'])} trials of {said['sweep']['name']} are as they were")


def equal(got, want, what):
    assert got == want, f"{what}: {got!r}, not {want!r}"


def optuna_opens(path, sweep, trials, curves):
    import warnings

    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    # A range that is not a whole number of steps would be warned of.
    warnings.simplefilter("error")
    storage = JournalStorage(JournalFileBackend(str(path)))
    study = optuna.load_study(study_name=None, storage=storage)
    equal(study.study_name, sweep["id"], "study")
    equal(study.direction.name, "MINIMIZE", "direction")
    equal(study.metric_names, ["eval/loss"], "metric names")
    equal(study.user_attrs["cost_usd"], sweep["cost_usd"], "cost")
    equal(study.best_value, min(t["eval_loss"] for t in trials if t["state"] == "completed"), "best value")
    names = {"completed": "COMPLETE", "stopped": "PRUNED", "diverged": "FAIL"}
    equal(len(study.trials), len(trials), "trials")
    for got, want in zip(study.trials, trials):
        what = want["id"]
        equal(got.number + 1, int(what.rsplit("/")[-1]), what)
        equal(got.state.name, names[want["state"]], what)
        params = {k: json.dumps(v, separators=(",", ":")) if isinstance(v, list) else v
                  for k, v in want["parameters"].items()}
        equal(got.params, params, what)
        for name, value in got.params.items():
            distribution = got.distributions[name]
            assert distribution._contains(distribution.to_internal_repr(value)), (name, value, distribution)
        reported = {p["step"]: p["eval/loss"] for p in curves[what] if p.get("eval/loss") is not None}
        equal(got.intermediate_values, reported, what)
        if got.state.name in ("COMPLETE", "PRUNED"):
            equal(got.value, want["eval_loss"], what)
        equal(got.user_attrs["id"], what, "id")
        equal(got.user_attrs["cost_usd"], want["cost_usd"], what)
        if want["summary"]:
            equal(got.user_attrs["peak_memory_bytes"], want["summary"]["peak_memory_bytes"], what)
        assert got.datetime_complete >= got.datetime_start, what
    # What Optuna computes of it, and that a study goes on where it was.
    assert set(optuna.importance.get_param_importances(study, evaluator=optuna.importance.PedAnovaImportanceEvaluator()))
    asked = study.ask()
    equal(asked.number, len(trials), "the next trial")


def dashboard_opens(path, sweep, trials, curves):
    """What optuna-dashboard's page is shown of the journal."""
    port = free_port()
    command = [pathlib.Path(sys.executable).with_name("optuna-dashboard"), path, "--port", str(port), "--server", "wsgiref", "--quiet"]
    dashboard = subprocess.Popen(command)

    def get(what):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/{what}") as answer:
            return json.load(answer)

    def serves():
        assert dashboard.poll() is None, f"optuna-dashboard ended with {dashboard.returncode}"
        try:
            return get("studies")
        except OSError:
            return None

    try:
        until("optuna-dashboard", serves)
        (study,) = get("studies")["study_summaries"]
        equal((study["study_name"], study["directions"]), (sweep["id"], ["minimize"]), "the dashboard's study")
        shown = get(f"studies/{study['study_id']}?after=0")
        equal(shown["name"], sweep["id"], "the study in full")
        names = {"completed": "Complete", "stopped": "Pruned", "diverged": "Fail"}
        by_number = {trial["number"] + 1: trial for trial in shown["trials"]}
        states = {number: trial["state"] for number, trial in by_number.items()}
        equal(states, {int(t["id"].rsplit("/")[-1]): names[t["state"]] for t in trials}, "the dashboard's trials")
        for want in trials:
            trial = by_number[int(want["id"].rsplit("/")[-1])]
            params = {param["name"] for param in trial["params"]}
            equal(params, set(want["parameters"]), want["id"])
            if trial["state"] == "Complete":
                equal(trial["values"], [want["eval_loss"]], want["id"])
    finally:
        dashboard.terminate()
        dashboard.wait()


def optuna_weighs(folder):
    """The report says of each parameter what Optuna's PED-ANOVA does."""
    import re

    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    study = optuna.load_study(
        study_name=None, storage=JournalStorage(JournalFileBackend(str(folder / "weighed")))
    )
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    wanted = optuna.importance.get_param_importances(study, evaluator=evaluator)
    # Markdown escapes underscores.
    report = (folder / "report/report.md").read_text().replace("\\_", "_")
    rows = re.findall(r"^\| (\w+) \| ([\d.]+) % \|$", report, re.MULTILINE)
    got = {name: float(part) / 100 for name, part in rows if name in wanted}
    equal(set(got), set(wanted), "weighed parameters")
    for name, part in wanted.items():
        assert abs(got[name] - part) < 6e-4, f"{name}: {got[name]}, not {part}"


def tensorboard_opens(path, sweep, trials, curves):
    import struct

    from tensorboard.backend.event_processing import data_provider
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
    from tensorboard.context import RequestContext
    from tensorboard.data.provider import ListHyperparametersResult
    from tensorboard.plugins.base_plugin import TBContext
    from tensorboard.plugins.hparams import api_pb2, list_session_groups
    from tensorboard.plugins.hparams.backend_context import Context

    def single(number):
        """The number as float32."""
        return struct.unpack("f", struct.pack("f", number))[0]

    multiplexer = EventMultiplexer(tensor_size_guidance={"scalars": 0, "text": 0})
    multiplexer.AddRunsFromDirectory(str(path))
    multiplexer.Reload()
    runs = multiplexer.Runs()
    equal(sorted(runs), sorted([".", *(f"trial-{t['id'].rsplit('/')[-1]}" for t in trials)]), "runs")
    for trial in trials:
        run = f"trial-{trial['id'].rsplit('/')[-1]}"
        wanted = {}
        for point in curves[trial["id"]]:
            for name, value in point.items():
                if name not in ("step", "time") and value is not None:
                    wanted.setdefault(name, []).append((point["step"], single(value)))
        if trial["cost_usd"] is not None:
            wanted["cost_usd"] = [(trial["step"], single(trial["cost_usd"]))]
        scalars = multiplexer.PluginRunToTagToContent("scalars").get(run, {})
        equal(sorted(scalars), sorted(wanted), run)
        for name, points in wanted.items():
            got = [(event.step, float(event.tensor_proto.float_val[0])) for event in multiplexer.Tensors(run, name)]
            equal(got, points, f"{run} {name}")
        (text,) = multiplexer.Tensors(run, "configuration")
        table = text.tensor_proto.string_val[0].decode()
        assert f"| max_steps | {trial['config']['max_steps']} |" in table, table
        equal(sorted(multiplexer.PluginRunToTagToContent("text")[run]), ["configuration", "outcome"], run)
        (text,) = multiplexer.Tensors(run, "outcome")
        assert text.tensor_proto.string_val[0].decode().startswith(trial["state"]), text
    # What the HParams page shows.
    provider = data_provider.MultiplexerDataProvider(multiplexer, str(path))
    context, request = Context(TBContext(data_provider=provider)), RequestContext()
    tags = context.hparams_metadata(request, "")
    nothing = ListHyperparametersResult(hyperparameters=[], session_groups=[])
    experiment = context.experiment_from_metadata(request, "", True, tags, nothing)
    equal(experiment.name, sweep["id"], "experiment")
    equal({info.name for info in experiment.hparam_infos}, set(trials[0]["parameters"]), "hyperparameters")
    every = [api_pb2.STATUS_SUCCESS, api_pb2.STATUS_FAILURE, api_pb2.STATUS_RUNNING]
    wanted = api_pb2.ListSessionGroupsRequest(start_index=0, slice_size=100, allowed_statuses=every)
    groups = list_session_groups.Handler(request, context, "", wanted).run().session_groups
    equal(len(groups), len(trials), "sessions")
    by_name = {group.name: group for group in groups}
    for trial in trials:
        hparams = by_name[trial["id"]].hparams
        equal(hparams["learning_rate"].number_value, trial["parameters"]["learning_rate"], trial["id"])
        equal(hparams["precision_mode"].string_value, trial["parameters"]["precision_mode"], trial["id"])


def pyarrow_opens(folder, sweep, trials, curves):
    import pyarrow.csv
    import pyarrow.parquet

    for read, ending in [(pyarrow.parquet.read_table, "parquet"), (pyarrow.csv.read_csv, "csv")]:
        table = read(folder / ending / f"trials.{ending}").to_pylist()
        equal([row["id"] for row in table], [trial["id"] for trial in trials], ending)
        for row, trial in zip(table, trials):
            for name in ["learning_rate", "lora_rank", "precision_mode"]:
                equal(row[name], trial["parameters"][name], trial["id"])
            for name in ["seed", "max_steps"]:
                equal(row[name], trial["config"][name], trial["id"])
            equal(row["cost_usd"], trial["cost_usd"], trial["id"])
            equal(row["simulated"], True, trial["id"])
            if trial["summary"]:
                equal(row["peak_memory_bytes"], trial["summary"]["peak_memory_bytes"], trial["id"])
        points = read(folder / ending / f"points.{ending}").to_pylist()
        wanted = [
            (trial["id"], point["step"], name, value)
            for trial in trials
            for point in curves[trial["id"]]
            for name, value in point.items()
            if name not in ("step", "time")
        ]
        equal([(p["trial"], p["step"], p["metric"], p["value"]) for p in points], wanted, ending)
    assert str(pyarrow.parquet.read_schema(folder / "parquet/points.parquet").field("time").type) == "timestamp[ms, tz=UTC]"


def mlflow_opens(uri, again, sweep, trials, curves):
    """With `again`, attempts made steps again, of which the first to come is kept."""
    import datetime
    import math

    from mlflow import MlflowClient

    def seconds(text):
        return int(datetime.datetime.fromisoformat(text).timestamp())

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(sweep["id"])
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    equal(sorted(run.data.tags["lorafleet.trial"] for run in runs), sorted(trial["id"] for trial in trials), "runs")
    by_trial = {run.data.tags["lorafleet.trial"]: run for run in runs}
    statuses = {"completed": "FINISHED", "stopped": "KILLED", "diverged": "FAILED"}
    for trial in trials:
        what, run = trial["id"], by_trial[trial["id"]]
        equal(run.info.status, statuses[trial["state"]], what)
        equal(run.info.run_name, f"trial-{what.rsplit('/')[-1]}", what)
        equal(run.info.start_time // 1000, seconds(trial["started_at"]), what)
        equal(run.info.end_time // 1000, seconds(trial["finished_at"]), what)
        equal(run.data.tags["lorafleet.state"], trial["state"], what)
        equal(json.loads(run.data.tags["lorafleet.cost_usd"]), trial["cost_usd"], what)
        config = {name: value for name, value in trial["config"].items() if value is not None}
        equal(sorted(run.data.params), sorted(config), what)
        for name, value in config.items():
            got = run.data.params[name]
            equal(got if isinstance(value, str) else json.loads(got), value, f"{what} {name}")
        wanted = {"cost_usd": [(trial["step"], trial["cost_usd"])]}
        for point in curves[what]:
            for name, value in point.items():
                if name not in ("step", "time"):
                    wanted.setdefault(name, []).append((point["step"], value))
        equal(sorted(run.data.metrics), sorted(wanted), what)
        for name, points in wanted.items():
            history = client.get_metric_history(run.info.run_id, name)
            # MLflow keeps what is infinite as the largest number; here it is null, as what is no number.
            told = [(m.step, m.value if math.isfinite(m.value) and abs(m.value) < 1e308 else None) for m in history]
            if again and name not in ("loss", "eval/loss", "learning_rate"):
                told, points = [step for step, _ in told], [step for step, _ in points]
            equal(sorted(told, key=str), sorted(points, key=str), f"{what} {name}")


if __name__ == "__main__":
    main()
