"""Does anything get lost, or end in a traceback? Counts are kept in data/results/soak.json.

    python data/soak.py           50 kills and 200 bad inputs: about 10 minutes on two cores

Kills: a short run is killed (SIGKILL) at a random moment, resumed, and compared with the run that
was never killed: same weights, bit for bit, and the same metrics.json, times aside.
Bad inputs: each must end in one line on stderr and exit code 2, and must leave no file behind.
"""
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

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import vlmrm  # noqa: E402  (it lies one folder up)

TASKS = ("reach-v3", "push-v3", "drawer-close-v3", "drawer-open-v3")


def small_data(path: Path) -> list[dict]:
    """A data set of four tasks of the shipped one, one of them unseen. Returns its episodes."""
    data = vlmrm.Dataset(HERE / "metaworld.npz")
    episodes = [data.episode(e) for e in np.flatnonzero(np.isin(data.task, TASKS))]
    vlmrm.write_dataset(path, episodes)
    return episodes


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


def without_times(folder: Path) -> dict:
    """The metrics of a run, but for what the clock says."""
    metrics = json.loads((folder / "metrics.json").read_text())
    for entry in [metrics, *metrics["log"]]:
        for key in ("seconds", "wall_seconds", "frames_per_second"):
            entry.pop(key, None)
    return metrics


def outcome(folder: Path) -> tuple:
    """Weights as bytes, metrics without times, and the names of the files."""
    return ((folder / "model.safetensors").read_bytes(), json.dumps(without_times(folder)),
            sorted(path.name for path in folder.iterdir()))


def kills(count: int, root: Path, rng) -> dict:
    """Kill, resume, compare. Also counts what the kills found."""
    small_data(root / "data.npz")
    options = ("--data", root / "data.npz", "--batch", 3, "--steps", 20, "--runs", root,
               "--device", "cpu", "--name")
    began = time.perf_counter()
    assert finish(start(*options, "whole")) == 0
    seconds, expected = time.perf_counter() - began, outcome(root / "whole")
    found = {"kills": 0, "identical": 0, "before the folder": 0, "before a checkpoint": 0,
             "after a checkpoint": 0, "after the end": 0, "seconds of a run": round(seconds, 1)}
    while found["kills"] < count:
        name = f"killed{found['kills']}"
        child = start(*options, name)
        time.sleep(rng.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
        if finish(child) == 0:
            shutil.rmtree(root / name)
            continue  # it was done already: no kill
        found["kills"] += 1
        folder = root / name
        if (folder / "metrics.json").exists():  # all was written, and the process about to end
            found["after the end"] += 1
            status = 0
            (folder / "checkpoint.safetensors").unlink(missing_ok=True)
            (folder / "lock").unlink(missing_ok=True)
        elif not (folder / "config.json").exists():
            found["before the folder"] += 1
            shutil.rmtree(folder, ignore_errors=True)
            status = finish(start(*options, name))
        else:
            found["after a checkpoint" if (folder / "checkpoint.safetensors").exists()
                  else "before a checkpoint"] += 1
            status = finish(start("--resume", folder))
        same = [mine == theirs for mine, theirs in zip(outcome(folder), expected)]
        found["identical"] += status == 0 and all(same)
        if status or not all(same):
            print(f"\n{name}: exit code {status}, same weights, metrics, files: {same}, "
                  f"{outcome(folder)[2]}")
        shutil.rmtree(folder)
        print(f"\rkills {found['kills']}, identical {found['identical']}", end="", flush=True)
    print()
    return found


def bad_data(root: Path, rng) -> dict:
    """{what is wrong: function that writes such a data file and returns the arguments}."""
    arrays, whole = dict(np.load(root / "good.npz")), (root / "good.npz").read_bytes()
    fields = list(arrays)

    def written(content: bytes):
        (root / "bad.npz").write_bytes(content)
        return ["--data", root / "bad.npz"]

    def changed(change):
        some = {name: array.copy() for name, array in arrays.items()}
        change(some)
        np.savez(root / "bad.npz", **some)
        return ["--data", root / "bad.npz"]

    def put(name, value):
        return changed(lambda a: a.__setitem__(name, value(a[name])))

    def not_finite(rewards):
        rewards[tuple(rng.integers(0, n) for n in rewards.shape)] = rng.choice(
            [np.nan, np.inf, -np.inf])
        return rewards

    return {
        "truncated data": lambda: written(whole[:rng.integers(0, len(whole))]),
        "noise as data": lambda: written(rng.bytes(rng.integers(0, 5000))),
        "array missing": lambda: changed(lambda a: a.pop(rng.choice(fields))),
        "wrong dtype": lambda: put(rng.choice(["rewards", "success", "steps", "offsets"]),
                                   lambda a: a.astype("U9")),
        "wrong shape": lambda: put(rng.choice(fields), lambda a: a[:-1]),
        "one dimension more": lambda: put(rng.choice(fields), lambda a: a[None]),
        "reward not finite": lambda: put("rewards", not_finite),
        "zero episodes": lambda: changed(lambda a: a.update({
            key: array[:0] for key, array in a.items() if key != "offsets"} | {
            "offsets": a["offsets"][:1]})),
        "unknown task in data": lambda: put("task", lambda a: np.r_[["x-v3"], a[1:]]),
        "unknown split": lambda: put("split", lambda a: np.r_[["x"], a[1:]]),
        "pickled objects": lambda: put("task", lambda a: a.astype(object)),
        "offsets out of order": lambda: put("offsets", lambda a: a[::-1].copy()),
        "no training episodes": lambda: put("split", lambda a: np.full_like(a, "test")),
        "no test episodes": lambda: put("split", lambda a: np.full_like(a, "train")),
        "damaged first picture": lambda: put("strips", lambda a: np.r_[
            np.zeros(500, np.uint8), a[500:]]),
    }


def bad_files(root: Path, rng) -> dict:
    """The same for instructions, weights and videos; root has a trained run."""
    sentences = json.loads((HERE / "instructions.json").read_text(encoding="utf-8"))
    small = (root / "trained" / "model.safetensors").read_bytes()
    weights = load_file(root / "trained" / "model.safetensors")

    def instructions(change):
        some = json.loads(json.dumps(sentences))
        text = change(some)
        (root / "bad.json").write_text(text if isinstance(text, str) else json.dumps(some))
        return ["--instructions", root / "bad.json"]

    def checkpoint(content):
        if isinstance(content, dict):
            save_file(content, root / "bad.safetensors")
        else:
            (root / "bad.safetensors").write_bytes(content)
        return ["--pretrained", root / "bad.safetensors"]

    def nan_weights():
        name = rng.choice(list(weights))
        return checkpoint(weights | {name: torch.full_like(weights[name], torch.nan)})

    def video(content, suffix=".mp4"):
        (root / f"bad{suffix}").write_bytes(content)
        return ["--score", root / f"bad{suffix}", "--instruction", "open", "--model",
                root / "trained"]

    return {
        "instructions not JSON": lambda: instructions(lambda s: "{" + text(rng)),
        "instructions a list": lambda: instructions(lambda s: "[1, 2]"),
        "instructions lack a task": lambda: instructions(lambda s: s.pop(rng.choice(TASKS))),
        "instructions lack a field": lambda: instructions(
            lambda s: s[rng.choice(TASKS)].pop("paraphrases")),
        "an empty instruction": lambda: instructions(
            lambda s: s[rng.choice(TASKS)].update(instruction=" ")),
        "truncated checkpoint": lambda: checkpoint(small[:rng.integers(0, len(small))]),
        "noise as checkpoint": lambda: checkpoint(rng.bytes(rng.integers(0, 5000))),
        "another architecture": lambda: checkpoint({"weight": torch.zeros(3)}),
        "weights of another shape": lambda: checkpoint({k: w[None] for k, w in weights.items()}),
        "weights not finite": nan_weights,
        "noise as video": lambda: video(rng.bytes(rng.integers(0, 5000))),
        "noise as GIF": lambda: video(b"GIF89a" + rng.bytes(rng.integers(0, 5000)), ".gif"),
    }


def text(rng) -> str:
    """A few characters of any kind."""
    return "".join(rng.choice(list("abcé漢🦾 -/\\\n%s{}"), rng.integers(1, 12)))


def bad_arguments(root: Path, rng) -> dict:
    """The same for what is typed."""
    score = ["--score", root / "picture.png", "--model", root / "trained", "--instruction"]
    return {
        "unknown objective": lambda: ["--objective", "x" + text(rng)],
        "unknown device": lambda: ["--device", "x" + text(rng)],
        "unknown backbone": lambda: ["--backbone", "x" + text(rng)],
        "unknown weights": lambda: ["--backbone", "ViT-B-32", "--pretrained", "x" + text(rng)],
        "unknown task": lambda: ["--collect", "--tasks", "x" + text(rng), "--output",
                                 root / "o.npz"],
        "unknown option": lambda: ["--x" + text(rng)],
        "no such data": lambda: ["--data", root / ("x" + text(rng).replace("/", ""))],
        "no such run": lambda: ["--resume", root / "nothing"],
        "run is finished": lambda: ["--resume", root / "trained"],
        "number out of range": lambda: [
            str(rng.choice(["--steps", "--batch", "--seed", "--lora", "--expert", "--frames",
                            "--size", "--workers", "--seeds"])),
            str(rng.choice(["-1", "1e3", "nan", "", "10" * 20, "two"]))],
        "learning rate": lambda: ["--learning-rate", str(rng.choice(["0", "-1", "nan", "inf"]))],
        "alpha": lambda: ["--alpha", str(rng.choice(["nan", "inf", "-1", "x"]))],
        "batch too large": lambda: ["--batch", str(rng.integers(4, 1000))],
        "score without a sentence": lambda: score[:-1],
        "an empty sentence": lambda: [*score, str(rng.choice(["", " ", "\n"]))],
        "an overlong sentence": lambda: [*score, "push " * int(rng.integers(23, 500))],
        "no such video": lambda: ["--score", root / "no.mp4", *score[2:], "x"],
        "no such model": lambda: [*score[:3], root, "--instruction", "x"],
        "output is there": lambda: ["--collect", "--output", rng.choice([root, score[1]])],
        "two things at once": lambda: [*score, "open", str(rng.choice(["--collect", "--tune"]))],
        "an option without effect": lambda: list(rng.choice([
            ("--instruction", "open"), ("--size", "64"), ("--tasks", "reach-v3")])),
        "strip too long": lambda: ["--collect", "--frames", str(rng.integers(200, 999))],
    }


def bad_inputs(root: Path, rng):
    """Endlessly: (what is wrong, arguments of a program that must refuse them)."""
    small_data(root / "good.npz")
    base = ["--data", root / "good.npz", "--steps", 1, "--batch", 3, "--device", "cpu", "--runs"]
    assert vlmrm.main([*map(str, base), str(root), "--name", "trained"]) == 0
    Image.new("RGB", (20, 30)).save(root / "picture.png")
    kinds = bad_data(root, rng) | bad_files(root, rng) | bad_arguments(root, rng)
    while True:
        for what, make in kinds.items():
            arguments = [str(argument) for argument in make()]
            if not {"--score", "--collect", "--resume"} & {*arguments}:
                arguments = [*map(str, base), str(root / "runs"), *arguments]
            yield what, arguments


def answers(count: int, root: Path, rng) -> dict:
    """How many bad inputs are answered by one line and exit code 2, and leave nothing behind."""
    found = {"bad inputs": 0, "answered": 0, "kinds": set(), "failures": []}
    for what, arguments in bad_inputs(root, rng):
        if found["bad inputs"] == count:
            break
        files = {path for path in root.rglob("*") if not path.name.startswith("bad")}
        output = io.StringIO()
        with contextlib.redirect_stderr(output), contextlib.redirect_stdout(io.StringIO()):
            try:
                status = vlmrm.main(arguments)
            except SystemExit as stop:
                status = stop.code
            except BaseException as problem:  # a traceback, for the user
                status = repr(problem)
        lines = [line for line in output.getvalue().replace("\r", "\n").splitlines()
                 if line.strip() and not line.startswith(("training", "evaluating"))]
        left = {path for path in root.rglob("*") if not path.name.startswith("bad")} - files
        found["bad inputs"] += 1
        found["kinds"].add(what)
        if status == 2 and len(lines) == 1 and lines[0].startswith("vlmrm: ") and not left:
            found["answered"] += 1
        else:
            found["failures"].append([what, str(status), lines[:3], sorted(map(str, left))])
            print(what, status, lines[:3], sorted(map(str, left)), file=sys.__stdout__)
    return found | {"kinds": len(found["kinds"])}


def main() -> None:
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        found |= {"kills": kills(50, root, np.random.default_rng(0))}
    with tempfile.TemporaryDirectory() as folder:
        found |= {"bad inputs": answers(200, Path(folder), np.random.default_rng(0))}
    vlmrm.plumbing.write_json(HERE / "results" / "soak.json", found)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
