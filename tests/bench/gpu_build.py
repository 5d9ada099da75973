"""The programs that `tests/gpu` runs, built into a folder that needs nothing beside it but a GPU machine.

CUDA's libraries are opened at run time and are none that the programs need to start, so that one without a driver says
so instead of not starting. candle-core asks cudarc for the other kind of linking, so it is built from a copy of which
that one word is changed.
"""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

from common import ROOT, SHARED

# Where candle-core's copy lies: outside of the workspace, whose packages are tested and linted.
WORK = pathlib.Path.home() / ".cache" / "lorafleet" / "gpu-build"
# CUDA's libraries, by how their names begin.
CUDA = re.compile(r"\[(lib(?:cuda|cudart|cublas|cublasLt|curand|nvrtc)\.so[^\]]*)\]")


def build(folder, checks):
    """Builds with cargo and copies programs, tests, fixtures and references into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    config, environment = loading_at_run_time()
    lock = ROOT / "Cargo.lock"
    kept = lock.read_bytes()
    try:
        for package, command in commands(checks):
            features = ["--package", package, "--features", "cuda", "--release", "--message-format", "json"]
            for program in built(["cargo", *config, *command, *features], environment):
                copy_program(program, folder, checks)
    finally:
        # The copy of candle-core is another source than the one that is locked.
        lock.write_bytes(kept)
    copy_files(folder)


def commands(checks):
    """What cargo is asked for, of which package."""
    yield "lorafleet-cli", ["build"]
    yield "lorafleet-trainer", ["build", "--example", "make_openllama"]
    for package in sorted({check["package"] for check in checks.values()}):
        names = [name for name, check in checks.items() if check["package"] == package]
        # The library's own tests are in the program of its name.
        tests = [part for name in names for part in (["--lib"] if name == "trainer" else ["--test", name])]
        yield package, ["test", "--no-run", *tests]


def loading_at_run_time():
    """Flags and variables with which cargo builds programs that open CUDA's libraries themselves."""
    metadata = ["cargo", "metadata", "--format-version", "1", "--locked"]
    listed = subprocess.run(metadata, check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    (candle,) = [p for p in json.loads(listed.stdout)["packages"] if p["name"] == "candle-core"]
    copy = WORK / f"candle-core-{candle['version']}"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(pathlib.Path(candle["manifest_path"]).parent, copy)
    manifest = copy / "Cargo.toml"
    text = manifest.read_text()
    if text.count('"dynamic-linking"') != 1:
        sys.exit(f"tests/gpu: candle-core {candle['version']} does not ask for cudarc's dynamic-linking once: see {manifest}")
    manifest.write_text(text.replace('"dynamic-linking"', '"dynamic-loading"'))
    # candle's kernels ask for the CUDA runtime; in this folder it is the static one.
    (WORK / "libcudart.so").write_text("INPUT(-lcudart_static -ldl -lrt -lpthread)\n")
    libraries = [WORK, cuda_home() / "lib64", *filter(None, [os.environ.get("LIBRARY_PATH")])]
    config = ["--config", f'patch.crates-io.candle-core.path="{copy}"']
    return config, {"LIBRARY_PATH": ":".join(map(str, libraries))}


def cuda_home():
    for name in ["CUDA_HOME", "CUDA_PATH", "CUDA_ROOT", "CUDA_TOOLKIT_ROOT_DIR"]:
        if os.environ.get(name):
            return pathlib.Path(os.environ[name])
    nvcc = os.environ.get("NVCC") or shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    return pathlib.Path(nvcc).resolve().parents[1]


def built(command, environment):
    """The programs that a cargo command makes, as its messages name them."""
    done = subprocess.run(
        command, check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}
    )
    messages = map(json.loads, done.stdout.splitlines())
    return [(message["target"]["name"], message["executable"]) for message in messages if message.get("executable")]


def copy_program(program, folder, checks):
    name, path = program
    if name not in ["lorafleet", "make_openllama", *checks]:
        return
    to = folder / name
    shutil.copy(path, to)
    subprocess.run(["strip", to], check=False)
    needed = needs(to)
    if needed:
        sys.exit(f"tests/gpu: {to} needs {', '.join(needed)} to start: where there is no driver it could not say so")
    print(to)


def needs(program):
    """CUDA's libraries that a program needs to start."""
    listed = subprocess.run(["readelf", "--dynamic", program], check=True, stdout=subprocess.PIPE, text=True)
    return CUDA.findall("\n".join(line for line in listed.stdout.splitlines() if "(NEEDED)" in line))


def copy_files(folder):
    """What the programs read, and the scripts that run them."""
    copies = {
        ROOT / "trainer/tests/fixtures": "fixtures",
        ROOT / "tests/bench": "tests/bench",
        SHARED / "reference": "shared/reference",
        SHARED / "data/models/stories260K-hf": "shared/data/models/stories260K-hf",
        SHARED / "data/instruct": "shared/data/instruct",
    }
    for source, place in copies.items():
        if source.is_dir():
            shutil.copytree(source, folder / place, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            print(f"tests/gpu: {source} is not there: what is compared with it will count as not checked", file=sys.stderr)
    shutil.copy(ROOT / "tests/gpu", folder / "tests/gpu")
