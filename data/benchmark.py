"""How fast is vlmrm.py, beside the textbook way, and beside the bare tower or renderer? It stays
beside vlmrm.py so that whoever changes that can measure again.

    python data/benchmark.py                everything, about 10 minutes on two cores
    python data/benchmark.py training       one part: collection, training, evaluation, default

Machines are noisy: what is compared is measured in turn, A B C A B C, in one process; quoted are
medians. Figures are kept in data/results/benchmark.json; data/report.py makes the table.
"""
import argparse
import contextlib
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import vlmrm  # before torch: see there

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

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

def workload():
    """The default configuration, data, sentences and model."""
    args = argparse.Namespace(**vars(vlmrm.parse_arguments([])) | {"objective": "triplet"})
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
    for seed in range(min(rounds, 3)):
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            process = subprocess.Popen(
                [sys.executable, HERE.parent / "vlmrm.py", "--seed", str(seed), "--runs", folder])
            usage = os.wait4(process.pid, 0)[2]
            found["wall_seconds"].append(time.perf_counter() - began)
            found["peak_gigabytes"].append(usage.ru_maxrss * 1024 / 1e9)
    return found

PARTS = {part.__name__: part for part in (collection, training, evaluation, default)}

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
    for name in args.parts or PARTS:
        found[name] = PARTS[name](args.rounds)
        print(name, json.dumps(found[name], indent=1))
        found["machine"] = {
            "cores": os.cpu_count(), "torch": torch.__version__,
            "system": f"{platform.system()} {platform.machine()}",
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None}
        vlmrm.write_whole(path, found)

if __name__ == "__main__":
    main()
