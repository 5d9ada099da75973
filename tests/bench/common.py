"""What the benchmarks and the checks with other tools (`tests/tools`) share."""

import contextlib
import json
import os
import pathlib
import platform
import socket
import subprocess
import sys
import time
import venv

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Where cargo builds.
TARGET_DIR = ROOT / os.environ.get("CARGO_TARGET_DIR", "target")
LORAFLEET = TARGET_DIR / "release" / "lorafleet"
# Models, rows and questions that are not of this repository.
SHARED = pathlib.Path(os.environ.get("LORAFLEET_SHARED", ROOT.parent / "shared")).resolve()
# Seconds that anything is waited for at most.
PATIENCE = 300


class Programs:
    """Programs that run in a folder; what still runs when `ending`, an ExitStack, closes is killed."""

    def __init__(self, folder, ending, **variables):
        self.folder, self.ending = folder, ending
        self.binary = pathlib.Path(os.environ.get("LORAFLEET", LORAFLEET)).resolve()
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("LORAFLEET_", "OTEL_"))}
        path = f"{self.binary.parent}:{os.environ['PATH']}"
        self.environment = {**kept, "PATH": path, "XDG_CONFIG_HOME": str(folder / "config"), **variables}

    def start(self, *command, said=None, variables=None, **options):
        """Starts a program, whose output goes to the file `said`, if that is given."""
        with contextlib.ExitStack() as closing:
            if said is not None:
                file = closing.enter_context(open(self.folder / said, "ab"))
                options |= {"stdout": file, "stderr": subprocess.STDOUT}
            process = subprocess.Popen(
                command, cwd=self.folder, env={**self.environment, **(variables or {})}, stdin=subprocess.DEVNULL, **options)
        self.ending.callback(process.wait)
        self.ending.callback(process.kill)
        return process

    def output(self, *command, **options):
        """What a command prints, once it has ended well."""
        options = {"check": True, "stdout": subprocess.PIPE, "text": True, "timeout": PATIENCE, **options}
        return subprocess.run(command, cwd=self.folder, env=self.environment, **options).stdout


def run(command, **options):
    """Runs a command whose output is for people, out of the way of our own."""
    subprocess.run(command, check=True, cwd=ROOT, stdout=sys.stderr, **options)


def build(*what):
    """Builds `lorafleet`, or what these arguments of cargo name."""
    run(["cargo", "build", "--release", "--locked", *(what or ["--package", "lorafleet-cli"])])


def output_of(command):
    """What a command prints."""
    return subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True).stdout


def python_with(name, packages):
    """The python of the virtual environment of that name, with the packages installed."""
    folder = ROOT / "target" / name
    python = folder / "bin" / "python"
    installed = folder / "installed"
    if not installed.is_file() or installed.read_text() != "\n".join(packages):
        venv.create(folder, with_pip=True)
        run([python, "-m", "pip", "install", "--quiet", *packages])
        installed.write_text("\n".join(packages))
    return python


def base_and_rows():
    """The small base and the rows of SHARED, or the quickstart's where there are none."""
    model = SHARED / "data/models/stories260K-hf"
    if model.is_dir():
        return model, SHARED / "data/instruct/instruct_500_guanaco.jsonl"
    return ROOT / "config/quickstart/base", ROOT / "config/quickstart/instruct.jsonl"


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def until(what, holds, patience=PATIENCE, pause=0.1):
    """Asks again and again, with a pause of so many seconds, until it holds."""
    end = time.monotonic() + patience
    while not holds():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(pause)


def processor():
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def tell(document, out):
    """Prints a document, and writes it to `out` if that is given."""
    text = json.dumps(document, indent=1)
    print(text)
    if out:
        out.write_text(text + "\n")
