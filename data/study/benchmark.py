"""How fast is vlmrm.py, beside the textbook way, and beside the bare tower or renderer? It stays
beside vlmrm.py so that whoever changes that can measure again.

    python data/benchmark.py                everything but `gpu`, about 12 minutes on two cores
    python data/benchmark.py training       one part: collection, training, evaluation, default,
                                            reach, many (processes), gpu (real backbones)

Machines are noisy: what is compared is measured in turn, A B C A B C, in one process; quoted are
medians. Figures are kept in data/results/benchmark.json; data/report.py makes the table.
"""
import argparse
import contextlib
import copy
import itertools
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
BEGAN = time.perf_counter()

import vlmrm  # before torch: see there

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

IMPORTS = time.perf_counter() - BEGAN

def in_turn(rounds: int, **ways) -> dict:
    """Median units per second of each way, measured in turn. A way is a function that does some
    work and returns how many units it did; its first call only warms up."""
    rates = {name: [] for name in ways}
    for _ in range(1 + rounds):
        for name, way in ways.items():
            began = time.perf_counter()
            done = way()
            rates[name].append(done / (time.perf_counter() - began))
    return {name: float(np.median(found[1:])) for name, found in rates.items()}

def collection(rounds: int) -> dict:
    """Frames of 96 x 96 per second, on one core, one task: of 40 steps that are all drawn; and of
    an episode of which the data set keeps 24 of 150 steps. The textbook's loop draws all 150."""
    task, rng = "drawer-open-v3", np.random.default_rng(0)
    env, policy, renderer = vlmrm.open_task(task, 96)

    def ours(steps=40, kept=40):  # as collect_task() does it: simulate, then draw and pack
        poses, _, _ = vlmrm.roll_out(env, policy(), rng, steps, noise=0.5, random_share=0.0)
        vlmrm.encode_frames(np.stack([vlmrm.draw(renderer, env.data, poses[step])
                                      for step in np.linspace(0, steps - 1, kept).astype(int)]))
        return kept

    # One renderer may live per process: the textbook's comes after ours is closed.
    rates = in_turn(rounds, ours=ours, ours_24_of_150=lambda: ours(150, 24),
                    bare=lambda: len([renderer.render() for _ in range(40)]))
    renderer.close()
    import gymnasium
    import metaworld  # registers its environments
    textbook_env = gymnasium.make("Meta-World/MT1", env_name=task, render_mode="rgb_array",
                                  width=96, height=96, camera_name="corner4")

    def textbook(steps=8, kept=8):
        textbook_env.reset()
        for _ in range(steps):
            textbook_env.step(textbook_env.action_space.sample())
            textbook_env.render()
        return kept

    return rates | in_turn(rounds, textbook=textbook, textbook_24_of_150=lambda: textbook(150, 24))

def workload(seed: int = 0):
    """The default configuration, data, sentences and model."""
    args = argparse.Namespace(
        **vars(vlmrm.parse_arguments([])) | {"objective": "triplet", "seed": seed})
    return (config := vlmrm.configuration(args), vlmrm.Dataset(args.data),
            vlmrm.load_instructions(args.instructions), vlmrm.prepare_model(config))

def bare_tower(model, batch: int, backward: bool):
    """The vision tower alone, on pixels that are ready."""
    pixels = torch.rand(batch, 3, model.size, model.size, device=model.mean.device) * 2 - 1

    def way():
        with torch.set_grad_enabled(backward):
            features = model.encode(model.clip.encode_image, pixels)
            if backward:
                features.sum().backward()
                model.zero_grad(set_to_none=True)
        features[0, 0].item()  # waits for a GPU
        return batch
    return way

def one_by_one(data, sentences, model):
    """The textbook's loader: a frame is a PIL image that goes through a torchvision transform."""
    from torchvision import transforms
    transform = transforms.Compose([
        transforms.Resize((model.size, model.size)), transforms.ToTensor(),
        transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))])

    def together(episodes):
        picks = [np.sort(np.random.choice(data.T, 5, replace=False)) for _ in episodes]
        return (torch.stack([
            torch.stack([transform(Image.fromarray(frame)) for frame in data.frames(e)[pick]])
            for e, pick in zip(episodes, picks)]),
            [sentences[task]["instruction"] for task in data.task[episodes]])

    return torch.utils.data.DataLoader(data.select(split="train"), batch_size=40, shuffle=True,
                                       num_workers=2, collate_fn=together)

def training(rounds: int) -> dict:
    """Frames per second of a training step of the default run (40 videos, 5 frames of each)."""
    config, data, sentences, model = workload()
    steps = []

    def ours():  # its rate is that of the steps: the frames are unpacked once, before the first
        began = []

        def loss(*batch):
            began.append(time.perf_counter())
            return vlmrm.triplet_loss(*batch)

        vlmrm.train(model, data, sentences, loss, config | {"steps": 4, "learning_rate": 1e-6})
        steps.extend(np.diff(began))
        return 800

    plain = vlmrm.prepare_model(config)
    plain.low_precision = False
    loader = one_by_one(data, sentences, plain)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-6)

    def textbook():
        for frames, texts in itertools.islice(loader, 3):  # float32, a caption for every frame
            frames = frames.to(plain.mean.device)
            images = F.normalize(plain.clip.encode_image(frames.flatten(0, 1)), dim=-1)
            captions = plain.tokenizer([text for text in texts for _ in range(5)])
            words = F.normalize(plain.clip.encode_text(captions.to(plain.mean.device)), dim=-1)
            loss = vlmrm.triplet_loss(images.unflatten(0, frames.shape[:2]),
                                      words.unflatten(0, frames.shape[:2])[:, 0], None)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return 3 * 200

    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):  # no bars
        rates = in_turn(rounds, ours=ours, textbook=textbook, bare=bare_tower(model, 200, True))
    return rates | {"ours": float(200 / np.median(steps))}

def evaluation(rounds: int) -> dict:
    """Frames per second of evaluate()."""
    _, data, sentences, model = workload()
    frames, tower = len(data.select(split="test")) * data.T, bare_tower(model, 240, False)

    return in_turn(rounds, ours=lambda: vlmrm.evaluate(model, data, sentences) and frames,
                   bare=lambda: sum(tower() for _ in range(frames // 240)))

def default(rounds: int) -> dict:
    """The default run, with seeds 0, 1, 2: wall time and memory."""
    found = {"wall_seconds": [], "peak_gigabytes": []}
    # A process counts the memory of the one that started it: a small one comes between.
    watch = ("import resource, subprocess, sys; subprocess.run(sys.argv[1:], stdout=2, check=True);"
             " print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)")
    for seed in range(min(rounds, 3)):
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            kilobytes = subprocess.check_output(
                [sys.executable, "-c", watch, sys.executable, HERE.parent / "vlmrm.py",
                 "--seed", str(seed), "--runs", folder])
            found["wall_seconds"].append(time.perf_counter() - began)
            found["peak_gigabytes"].append(int(kilobytes) * 1024 / 1e9)
    return found

def reach(rounds: int, aim: float = 0.9) -> list[float]:
    """Seconds from the start of the program, imports and all, until VOC on the validation experts
    is .90, with seeds 0, 1, 2. It is looked at after every fifth step, with the clock stopped."""
    found = []
    for seed in range(min(rounds, 3)):
        began, steps = time.perf_counter() - IMPORTS, itertools.count()
        config, data, sentences, model = workload(seed)
        held_out = copy.copy(data)
        held_out.split = np.where(data.split == "validation", "test", "train")

        def loss(*batch):
            nonlocal began
            if next(steps) % 5 == 0:
                stopped = time.perf_counter()
                report = vlmrm.evaluate(model, held_out, sentences)["seen"]
                if report["voc"]["value"] >= aim:
                    raise StopIteration(stopped - began)
                model.train()
                began += time.perf_counter() - stopped
            return vlmrm.triplet_loss(*batch)

        try:
            vlmrm.train(model, data, sentences, loss, config)
            found.append(math.inf)  # not within the run
        except StopIteration as end:
            found.append(end.value)
    return found

def many(rounds: int) -> dict:
    """Seconds of the default run by one process with two threads, and by two with one each."""
    ways = {"one": (2, [sys.executable]), "two": (1, [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"])}
    seconds = {way: [] for way in ways}
    for _, (way, (threads, program)) in itertools.product(range(min(rounds, 3)), ways.items()):
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            subprocess.run(
                [*program, HERE.parent / "vlmrm.py", "--device", "cpu", "--runs", folder],
                env=os.environ | {"OMP_NUM_THREADS": str(threads)}, check=True)
            seconds[way].append(time.perf_counter() - began)
    return seconds

def matrix_peak(device: str, size: int = 8192) -> float:
    """Floating point operations per second of a large product of matrices, bfloat16."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in "ab")
    return in_turn(20, product=lambda: 2 * size**3 * bool((a @ b)[0, 0].isfinite()))["product"]

def real_step(name: str, way: str, videos: int, device: str):
    """A training step of triplet, as train() does it, of a real architecture with random weights
    and LoRA of rank 8, on random pictures. Returns a function for in_turn()."""
    torch.manual_seed(0)
    clip = open_clip.create_model(name)
    model = vlmrm.RewardModel(clip, lambda texts: torch.randint(
        1, 400, (len(texts), clip.context_length)))  # a tokenizer would have to be downloaded
    vlmrm.add_lora(model, 8)
    model.to(device).train()
    model.low_precision = way != "float32"
    if "compiled" in way:
        clip.visual = torch.compile(clip.visual)
    weights, rng = [w for w in model.parameters() if w.requires_grad], np.random.default_rng(0)
    optimizer = torch.optim.AdamW(weights, lr=1e-5, fused=True)
    pictures = rng.integers(0, 256, (64, model.size, model.size, 3), dtype=np.uint8)
    there = torch.tensor(pictures, device=device).permute(0, 3, 1, 2).contiguous()

    def step():
        some = rng.integers(0, 64, (videos, 5))
        if "there" in way:  # the videos live on the device
            pixels = there[torch.tensor(some.ravel(), device=device)].float()
            frames = model.encode(clip.encode_image, pixels.sub_(model.mean).div_(model.std))
            frames = frames.view(videos, 5, -1)
        else:
            frames = model.embed_frames(pictures[some])
        loss = vlmrm.triplet_loss(frames, model.embed_texts(["x"] * videos), None)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        return 5 * videos * bool(loss.isfinite())  # waits for a GPU
    return step

def gpu(rounds: int, names=("ViT-B-16", "ViT-B-16-SigLIP2"), videos: int = 40) -> dict:
    """Frames per second of a training step with real architectures at their size, in each way, and
    which share of matrix_peak() that is: all operations, forward and backward, are counted."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = {"card": torch.cuda.get_device_name() if device == "cuda" else "none",
             "torch": torch.__version__,
             "peak": matrix_peak(device, 8192 if device == "cuda" else 256)}
    ways = ["float32", "bfloat16", "bfloat16, videos there"]
    ways += ["bfloat16, videos there, compiled"] * (device == "cuda")
    for name in names:
        with FlopCounterMode(display=False) as counter:
            real_step(name, "bfloat16", videos, device)()
        for way in ways:
            rate = in_turn(rounds, step=real_step(name, way, videos, device))["step"]
            found[f"{name}, {way}"] = {"frames": rate, "share": (
                rate / (5 * videos) * counter.get_total_flops() / found["peak"])}
            if device == "cuda":
                found[f"{name}, {way}"]["gigabytes"] = torch.cuda.max_memory_allocated() / 1e9
                torch.cuda.reset_peak_memory_stats()
    return found

PARTS = {part.__name__: part for part in (
    collection, training, evaluation, default, reach, many, gpu)}

def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    args = parser.parse_args()
    path = args.results / "benchmark.json"
    found = vlmrm.read_json(path) if path.exists() else {}
    if strange := {*args.parts} - {*PARTS}:
        parser.error(f"unknown part {min(strange)!r}; there are {', '.join(PARTS)}")
    for name in args.parts or [name for name in PARTS if name != "gpu"]:
        found[name] = PARTS[name](args.rounds)
        print(name, json.dumps(found[name], indent=1))
        found["machine"] = {
            "cores": os.cpu_count(), "torch": torch.__version__,
            "system": f"{platform.system()} {platform.machine()}",
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None}
        vlmrm.write_whole(path, found)

if __name__ == "__main__":
    main()
