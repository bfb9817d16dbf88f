"""Does anything get lost, or end in a traceback? It stays beside vlmrm.py because it takes ten
minutes, too long for a test. Counts are kept in data/results/soak.json.

    python data/soak.py           50 kills and 200 bad inputs, on two cores
    python data/soak.py --kills 3 --inputs 50 --results /tmp

Kills: a short run is killed (SIGKILL) at a random moment, taken up again, and compared with the run
that was never killed: same weights, bit for bit, and the same metrics.json, times aside.
Bad inputs: each must end in one line on stderr and exit code 2, and must leave no file behind.
"""
import argparse
import contextlib
import io
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import vlmrm  # before torch: see there

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save

TASKS = ("reach-v3", "push-v3", "drawer-close-v3", "drawer-open-v3")

def small_data(path: Path) -> None:
    """A data set of four tasks of the shipped one, one of them unseen."""
    data = vlmrm.Dataset(HERE / "metaworld.npz")
    vlmrm.write_dataset(path, [
        {name: getattr(data, name)[e] for name in vlmrm.EPISODE}
        | {"strip": data.strips[data.offsets[e]:data.offsets[e + 1]].tobytes()}
        for e in np.flatnonzero(np.isin(data.task, TASKS))])

def start(*arguments) -> int:
    """Run the program in a forked process: the slow imports are done already."""
    if (child := os.fork()) == 0:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        os._exit(vlmrm.main([str(argument) for argument in arguments]))
    return child

def finish(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def outcome(runs: Path) -> tuple:
    """Weights as bytes, metrics without times, and the files of the finished run in a folder."""
    for path in runs.glob("*/metrics.json"):
        metrics = json.loads(path.read_text())
        del metrics["wall_seconds"]
        return ((path.parent / "model.safetensors").read_bytes(), json.dumps(metrics),
                {file.name for file in path.parent.iterdir()} - {"checkpoint.safetensors"})
    return None, None, None

def kills(count: int, root: Path, rng) -> dict:
    """Kill, take up, compare."""
    small_data(root / "data.npz")
    options = ("--data", root / "data.npz", "--batch", 3, "--steps", 20, "--device", "cpu",
               "--runs")
    began = time.perf_counter()
    assert finish(start(*options, root / "whole")) == 0
    seconds, expected = time.perf_counter() - began, outcome(root / "whole")
    found = {"kills": 0, "identical": 0, "after a checkpoint": 0}
    while found["kills"] < count:
        child = start(*options, runs := root / "killed")
        time.sleep(rng.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
        if finish(child) < 0:  # or it was done already: no kill
            saved, done = ([*runs.glob(f"*/{name}")] for name in (
                "checkpoint.safetensors", "metrics.json"))
            found["kills"] += 1
            found["after a checkpoint"] += bool(saved)
            resume = saved and not done and found["kills"] % 2  # by turns the two ways to go on
            status = finish(start(*(["--resume", saved[0].parent] if resume else [*options, runs])))
            same = [mine == theirs for mine, theirs in zip(outcome(runs), expected)]
            found["identical"] += status == 0 and all(same)
            if status or not all(same):
                print("exit code", status, *runs.rglob("*"), "same weights, metrics, files:", same)
        shutil.rmtree(runs, ignore_errors=True)
    return found

def text(rng) -> str:
    """A few characters of any kind."""
    return "".join(rng.choice(list("abcé漢🦾 -/\\\n%s{}"), rng.integers(1, 12)))

def bad_data(root: Path, rng) -> dict:
    """{what is wrong: function that writes such a data file and returns the arguments}."""
    arrays, whole = dict(np.load(root / "good.npz")), (root / "good.npz").read_bytes()
    fields = list(arrays)

    def written(content: bytes):
        (root / "bad.npz").write_bytes(content)
        return ["--data", root / "bad.npz"]

    def put(name, change):
        some = arrays | {name: change(arrays[name])}
        np.savez(file := io.BytesIO(), **{key: a for key, a in some.items() if a is not None})
        return written(file.getvalue())

    return {
        "truncated data": lambda: written(whole[:rng.integers(0, len(whole))]),
        "noise as data": lambda: written(rng.bytes(rng.integers(0, 5000))),
        "array missing": lambda: put(rng.choice(fields), lambda a: None),
        "wrong dtype": lambda: put(rng.choice(["rewards", "steps"]), lambda a: a.astype("U9")),
        "wrong shape": lambda: put(rng.choice(fields), lambda a: a[:-1]),
        "rewards not finite": lambda: put("rewards", lambda a: np.where(a > 1, np.nan, a)),
        "unknown task in data": lambda: put("task", lambda a: np.r_[["x-v3"], a[1:]]),
        "pickled objects": lambda: put("task", lambda a: a.astype(object)),
        "offsets out of order": lambda: put("offsets", lambda a: a[::-1]),
        "no test episodes": lambda: put("split", lambda a: np.full_like(a, "train")),
        "damaged picture": lambda: put("strips", lambda a: np.r_[np.uint8([0] * 500), a[500:]]),
    }

def bad_files(root: Path, rng) -> dict:
    """The same for instructions, weights, videos and objectives; root has a trained run."""
    sentences = vlmrm.load_instructions(HERE / "instructions.json")
    weights = load_file(root / "triplet-seed0" / "model.safetensors")
    task, name = TASKS[0], rng.choice(list(weights))

    def bad(option, suffix, content):
        content = content() if callable(content) else content
        (root / f"bad{suffix}").write_bytes(
            content if isinstance(content, bytes) else content.encode())
        more = ["--instruction", "open", "--model", root / "triplet-seed0"]
        return [option, root / f"bad{suffix}", *(more if option == "--score" else [])]

    noise = lambda: rng.bytes(rng.integers(0, 5000))
    return {what: lambda case=case: bad(*case) for what, case in {
        "instructions not JSON": ("--instructions", ".json", lambda: "{" + text(rng)),
        "instructions lack a task": ("--instructions", ".json", json.dumps(
            {key: entry for key, entry in sentences.items() if key != task})),
        "an empty instruction": ("--instructions", ".json", json.dumps(
            sentences | {task: sentences[task] | {"instruction": " "}})),
        "truncated weights": ("--pretrained", ".safetensors",
                              lambda: save(weights)[:rng.integers(0, 10**6)]),
        "noise as weights": ("--pretrained", ".safetensors", noise),
        "weights of another shape": ("--pretrained", ".safetensors", save(
            weights | {name: torch.zeros(1, 2, 3)})),
        "weights not finite": ("--pretrained", ".safetensors", save(
            weights | {name: torch.full_like(weights[name], torch.nan)})),
        "noise as GIF": ("--score", ".gif", lambda: b"GIF89a" + noise()),
        "a loss that is no tensor": ("--objective", ".py", "def loss(f, t, s): return 0.5"),
        "a loss not finite": ("--objective", ".py", "def loss(f, t, s): return f.sum() / 0"),
    }.items()}

def bad_arguments(root: Path, rng) -> dict:
    """The same for what is typed."""
    score = ["--score", root / "picture.png", "--model", root / "triplet-seed0", "--instruction"]
    collect, numbers = ["--collect", "--data", root / "o.npz"], ("-1", "1e9", "nan", "", "inf")
    return {
        "unknown objective": lambda: ["--objective", "x" + text(rng)],
        "unknown weights": lambda: ["--backbone", "ViT-B-32", "--pretrained", "x" + text(rng)],
        "unknown task": lambda: [*collect, "--tasks", "x" + text(rng)],
        "no such data": lambda: ["--data", root / ("x" + text(rng).replace("/", ""))],
        "no such run": lambda: ["--resume", root / "nothing"],
        "number out of range": lambda: [str(rng.choice([
            "--steps", "--batch", "--seed", "--lora", "--frames", "--workers", "--seeds",
            "--learning-rate"])), str(rng.choice(numbers))],
        "batch too large": lambda: ["--batch", rng.integers(4, 1000)],
        "an empty sentence": lambda: [*score, str(rng.choice(["", " ", "\n"]))],
        "an overlong sentence": lambda: [*score, "push " * int(rng.integers(23, 500))],
        "no such video": lambda: ["--score", root / "no.mp4", *score[2:], "x"],
        "data are there": lambda: ["--collect", "--data", rng.choice([root, score[1]])],
        "an option without effect": lambda: ["--size", rng.integers(8, 96)],
        "strip too long": lambda: [*collect, "--frames", rng.integers(200, 999)],
    }

def answers(count: int, root: Path, rng) -> dict:
    """How many bad inputs are answered by one line and exit code 2, and leave nothing behind."""
    small_data(root / "good.npz")
    base = ["--data", root / "good.npz", "--steps", 1, "--batch", 3, "--device", "cpu",
            "--runs", root]
    assert finish(start(*base)) == 0
    Image.new("RGB", (20, 30)).save(root / "picture.png")
    kinds = list((bad_data(root, rng) | bad_files(root, rng) | bad_arguments(root, rng)).items())
    found = {"bad inputs": count, "answered": 0, "kinds": min(count, len(kinds)), "failures": []}
    for k in range(count):
        what, make = kinds[k % len(kinds)]
        arguments = [str(argument) for argument in make()]
        if not {"--score", "--collect", "--resume"} & {*arguments}:
            arguments = [*map(str, base), *arguments]
        files = {path for path in root.rglob("*") if not path.name.startswith("bad")}
        with contextlib.redirect_stderr(io.StringIO()) as output, contextlib.redirect_stdout(None):
            try:
                status = vlmrm.main(arguments)
            except SystemExit as stop:
                status = stop.code
            except BaseException as problem:  # a traceback, for the user
                status = repr(problem)
        lines = [line for line in output.getvalue().replace("\r", "\n").splitlines()
                 if line.strip() and not line.startswith(("training", "evaluating"))]
        left = {path for path in root.rglob("*") if not path.name.startswith("bad")} - files
        if status == 2 and len(lines) == 1 and lines[0].startswith("vlmrm: ") and not left:
            found["answered"] += 1
        else:
            found["failures"].append([what, str(status), lines[:3], sorted(map(str, left))])
    return found

def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--inputs", type=int, default=200)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    args, found = parser.parse_args(), {}
    for key, count, part in (("kills", args.kills, kills), ("bad inputs", args.inputs, answers)):
        with tempfile.TemporaryDirectory() as folder:
            found[key] = part(count, Path(folder), np.random.default_rng(0))
    vlmrm.write_whole(args.results / "soak.json", found)
    print(json.dumps(found, indent=1))

if __name__ == "__main__":
    main()
