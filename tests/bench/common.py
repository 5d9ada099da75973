"""What the benchmarks beside other programs share."""

import json
import os
import pathlib
import platform
import subprocess
import sys
import venv

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Where cargo builds.
TARGET_DIR = ROOT / os.environ.get("CARGO_TARGET_DIR", "target")
LORAFLEET = TARGET_DIR / "release" / "lorafleet"


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
