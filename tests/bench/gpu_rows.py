"""The rows of `tests/gpu bench`: how one is measured, what follows from it, and whether that is what was to be reached.

`gpu.json` has the rows. A figure is a number by name; a goal a bound of a figure. A goal whose figure there is none of,
for lack of the peer or on another GPU than it is meant for, is not judged.
"""

import importlib.util
import json
import shutil
import subprocess
import sys
import time

from common import ROOT

TABLE = json.loads((ROOT / "tests/bench/gpu.json").read_text())
ROWS = {row["row"]: row for row in TABLE["rows"]}
# Bytes that the model of the loading row takes on the disk, with some room.
MODEL_BYTES = 14e9


class Budget:
    """The time there is: what would begin after it does not, and what runs over it is ended."""

    def __init__(self, minutes):
        self.started = time.monotonic()
        self.seconds = minutes * 60

    def spent(self):
        return time.monotonic() - self.started

    def left(self):
        return self.seconds - self.spent()


def measure(command, budget):
    """A benchmark's JSON, or what went wrong."""
    if budget.left() <= 0:
        return {"not_run": "the time was over"}
    command = list(map(str, command))
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, timeout=budget.left()
        )
    except subprocess.TimeoutExpired:
        return {"not_run": "the time ran out meanwhile"}
    except OSError as error:
        return {"failed": str(error)}
    if done.returncode != 0 or "{" not in done.stdout:
        return {"failed": done.stderr[-600:].strip() or f"ended with {done.returncode} and said nothing"}
    return {"command": " ".join(command), **json.loads(done.stdout[done.stdout.index("{") :])}


def flags_of(row):
    return [*TABLE["shapes"][row["shape"]].split(), *TABLE["timing"].split(), *row["flags"].split()]


def missing_of_peer(flags):
    needed = ["torch", "transformers", "peft"] + (["bitsandbytes"] if "4bit" in flags else [])
    return [name for name in needed if not importlib.util.find_spec(name)]


def run(row, folder, device, budget, model):
    """Measures a row, ours and then the peer."""
    result = {"row": row["row"]}
    if "shape" not in row:
        result["lorafleet"] = load(row, folder, device, budget, model)
        return result
    flags = ["--device", device, *flags_of(row)]
    result["lorafleet"] = measure([folder / "lorafleet", "bench", "train", "--profile", *flags], budget)
    if "without_peft" not in row:
        missing = missing_of_peer(flags)
        peer = [sys.executable, "-W", "ignore", ROOT / "tests/bench/peft_train.py", *flags]
        result["peft"] = {"not_run": f"without {', '.join(missing)}"} if missing else measure(peer, budget)
    return result


def load(row, folder, device, budget, model):
    """Loads OpenLLaMA 7B's shapes from pickles, which are made first unless they are there."""
    if not (model / "pytorch_model.bin.index.json").is_file():
        model.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(model).free < MODEL_BYTES:
            return {"not_run": f"{model} has no {MODEL_BYTES / 1e9:.0f} GB of room"}
        try:
            made = subprocess.run([folder / "make_openllama", model], stdout=sys.stderr, timeout=max(budget.left(), 1))
        except subprocess.TimeoutExpired:
            made = None
        if made is None or made.returncode != 0:
            # Half a model is none.
            shutil.rmtree(model)
            return {"not_run": "the time ran out while its files were made"} if made is None else {"failed": "make_openllama"}
    command = [folder / "lorafleet", "bench", "load", model, "--device", device, *row["flags"].split()]
    return measure(command, budget)


def figures(result, results, card):
    """What follows from a row; `results` are those of all rows so far, itself among them."""
    ours, peer = result["lorafleet"], result.get("peft", {})
    if "failed" in ours or "not_run" in ours:
        return {}
    found = {name: ours[name] for name in ["tokens_per_second", "peak_memory_bytes", "seconds"] if ours.get(name)}
    speed, gpu = ours.get("tokens_per_second"), ours.get("gpu") or {}
    if gpu:
        found["device_bytes"] = gpu["device_used_bytes"]
        found["context_bytes"] = gpu["opened_bytes"]
        # Context, kernels, workspaces: what agents leave free of a device has to be as much.
        found["outside_bytes"] = gpu["device_used_bytes"] - gpu["pool_reserved_high_bytes"]
    predicted = ours.get("predicted_peak_memory_bytes")
    if predicted and ours.get("peak_memory_bytes"):
        found["peak_off_by"] = abs(predicted / ours["peak_memory_bytes"] - 1)
    if gpu.get("predicted_device_bytes"):
        found["device_off_by"] = abs(gpu["predicted_device_bytes"] / gpu["device_used_bytes"] - 1)
    if speed and "tokens_per_second" in peer:
        found["times_peft"] = speed / peer["tokens_per_second"]
    peaks = [peak for name, peak in TABLE["peak_flops"].items() if name in card]
    if peaks and ours.get("flops_per_second"):
        found["share_of_peak"] = ours["flops_per_second"] / peaks[0]
    if result["row"].startswith("qlora-") and speed:
        alike = [r["lorafleet"] for r in results if r["row"] == result["row"].removeprefix("q")]
        found.update({"times_lora": speed / one["tokens_per_second"] for one in alike if "tokens_per_second" in one})
    return found


def verdicts(row, found, card):
    """Each goal of a row in words, and whether it is met: yes, no, or None where it is not judged."""
    solo = TABLE["every_solo_row"]["at_most"] if "shape" in row and "without_peft" not in row else {}
    on_h200 = found if "H200" in card else {}
    judged = {}
    for name, bound in {**row.get("at_most", {}), **solo}.items():
        judged[f"{name} <= {bound:g}"] = found[name] <= bound if name in found else None
    for name, bound in row.get("at_least", {}).items():
        judged[f"{name} >= {bound:g}"] = found[name] >= bound if name in found else None
    for name, bound in row.get("at_least_on_h200", {}).items():
        judged[f"{name} >= {bound:g} on an H200"] = on_h200[name] >= bound if name in on_h200 else None
    return judged


def why_not(side):
    """Why a side has no figures."""
    if "not_run" in side:
        return f"not run: {side['not_run']}"
    return f"failed: {(side['failed'].strip() or '?').splitlines()[-1]}" if "failed" in side else ""


def table(report):
    """The report as Markdown."""
    lines = [
        f"# {report['gpu']}, {report['date']}",
        "",
        f"`{report['command']}`, {report['seconds']:.0f} seconds, {'passed' if report['passed'] else 'NOT passed'}.",
    ]
    if report["checks"]:
        lines += ["", "| check | | seconds |", "|---|---|---|"]
    for check in report["checks"]:
        said = "passed" if check["passed"] else f"NOT passed: {check['why']}"
        lines.append(f"| {check['check']} | {said} | {check['seconds']:.0f} |")
    peers = report["peft_in_bfloat16"]
    if "furthest" in peers:
        off = ", ".join(f"{value:.2e} with {name}" for name, value in peers["furthest"].items())
        lines += ["", f"PEFT's losses in bfloat16 are off from float32's by up to {off}."]
    elif peers:
        lines += ["", f"PEFT's losses in bfloat16: {why_not(peers)}."]
    if report["rows"]:
        lines += [
            "",
            "| row | tokens/s | of peak | × PEFT | × LoRA | peak | predicted | device | context | PEFT's tokens/s, peak | goals |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]
    lines += [line(result) for result in report["rows"]]
    profiles = [profile(result) for result in report["rows"] if "profile" in result["lorafleet"]]
    if profiles:
        lines += ["", "| row | one more step, or the load, timed launch by launch | where its time went |", "|---|---|---|", *profiles]
    return "\n".join(lines) + "\n"


def profile(result):
    """Where the time of a step or a load went: what took most, and what lies between the launches. Copies of weights run
    beside them."""
    taken = result["lorafleet"]["profile"]
    percent = lambda seconds: f"{100 * seconds / taken['seconds']:.0f} %"  # noqa: E731
    most = [f"{share['what']} {percent(share['seconds'])} ({share['calls']} ×)" for share in taken["shares"][:8]]
    launches = [share["seconds"] for share in taken["shares"] if share["what"] != "copy of weights"]
    between = percent(taken["seconds"] - sum(launches))
    return f"| {result['row']} | {1e3 * taken['seconds']:.1f} ms | {', '.join(most)}; between launches {between} |"


def line(result):
    ours, peer, found = result["lorafleet"], result.get("peft", {}), result["figures"]
    words = {True: "met", False: "MISSED", None: "not judged"}
    goals = "; ".join(f"{goal}: {words[met]}" for goal, met in result["verdicts"].items()) or "–"
    if why_not(ours):
        return f"| {result['row']} | {why_not(ours)} |||||||||| {goals} |"
    gb = lambda value: f"{value / 1e9:.2f} GB" if value else "–"  # noqa: E731
    times = lambda name: f"{found[name]:.2f}" if name in found else "–"  # noqa: E731
    speed = f"{found['tokens_per_second']:.0f}" if "tokens_per_second" in found else f"{found['seconds']:.1f} s"
    beside = why_not(peer) or "–"
    if "tokens_per_second" in peer:
        beside = f"{peer['tokens_per_second']:.0f}, {gb(peer.get('peak_memory_bytes'))}"
    cells = [
        result["row"], speed, times("share_of_peak"), times("times_peft"), times("times_lora"),
        gb(found.get("peak_memory_bytes")), gb(ours.get("predicted_peak_memory_bytes")),
        gb(found.get("device_bytes")), gb(found.get("context_bytes")), beside, goals,
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"
