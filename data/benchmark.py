"""How fast is vlmrm.py, beside the textbook way and beside what the hardware allows?

    python data/benchmark.py                everything, about 15 minutes on two cores
    python data/benchmark.py training       one part: collection, training, evaluation, default,
                                            growth, large

Machines are noisy, so what is compared is measured in turn, A B C A B C, in one process; quoted are
medians and their ratios. Figures are kept in data/results/benchmark.json, and drawn by
data/report.py. This is no test, and takes no part in them.
"""
import argparse
import contextlib
import copy
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import vlmrm  # noqa: E402  (it lies one folder up)

ROUNDS = 7


def in_turn(**ways) -> dict:
    """Median units per second of each way, measured in turn. A way is a function that does some
    work and returns how many units it did; its first call only warms up."""
    for way in ways.values():
        way()
    rates = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            began = time.perf_counter()
            done = way()
            rates[name].append(done / (time.perf_counter() - began))
    return {name: float(np.median(found)) for name, found in rates.items()}


def collection() -> dict:
    """Frames of 96 x 96 per second, on one core, one task: of 40 steps that are all drawn; and of
    an episode of which the data set keeps 24 of 150 steps. The textbook's loop draws all 150."""
    task, size, steps = "drawer-open-v3", 96, 40
    env, policy, renderer = vlmrm.open_task(task, size)
    env.seeded_rand_vec, env._freeze_rand_vec = True, False
    env.seed(0)
    import gymnasium
    import metaworld  # noqa: F401  (registers its environments)
    textbook_env = gymnasium.make("Meta-World/MT1", env_name=task, render_mode="rgb_array",
                                  width=size, height=size, camera_name="corner4")

    def textbook(steps=8, kept=8):
        textbook_env.reset()
        for _ in range(steps):
            textbook_env.step(textbook_env.action_space.sample())
            textbook_env.render()
        return kept

    rng = np.random.default_rng(0)

    def ours(steps=steps, kept=steps):  # as collect_task() does it: simulate, then draw and pack
        poses, _, _ = vlmrm.roll_out(env, policy(), rng, steps, noise=0.5, random_share=0.0)
        vlmrm.encode_frames(np.stack([vlmrm.draw(renderer, env.data, poses[step])
                                      for step in np.linspace(0, steps - 1, kept).astype(int)]))
        return kept

    poses, _, _ = vlmrm.roll_out(env, policy(), rng, steps, noise=0.5, random_share=0.0)

    def drawing():  # neither simulated nor packed
        for pose in poses:
            vlmrm.draw(renderer, env.data, pose)
        return steps

    def bare():
        for _ in range(steps):
            renderer.render()
        return steps

    # One renderer may live per process: the textbook's comes after ours is closed.
    rates = in_turn(ours=ours, drawing=drawing, bare=bare, ours_24_of_150=lambda: ours(150, 24))
    renderer.close()
    return rates | in_turn(textbook=textbook, textbook_24_of_150=lambda: textbook(150, 24))


def workload():
    """The default data, model and one batch of the default run."""
    args = vlmrm.parse_arguments([])
    data, sentences = vlmrm.load_data(args)
    return args, data, sentences, vlmrm.prepare_model(args)


def bare_tower(model, pixels: torch.Tensor, backward: bool):
    """The vision tower alone, on pixels that are ready."""
    def way():
        with torch.set_grad_enabled(backward):
            features = model.encode(model.clip.encode_image, pixels)
            if backward:
                features.sum().backward()
                model.zero_grad(set_to_none=True)
            elif pixels.is_cuda:
                torch.cuda.synchronize()
        return len(pixels)
    return way


class FramesOneByOne(torch.utils.data.Dataset):
    """The textbook's data set: a frame is a PIL image that goes through a torchvision transform."""

    def __init__(self, data, episodes, sentences, model):
        from torchvision import transforms
        self.data, self.episodes, self.sentences = data, episodes, sentences
        self.transform = transforms.Compose([
            transforms.Resize((model.size, model.size)), transforms.ToTensor(),
            transforms.Normalize((model.mean / 255).flatten().tolist(),
                                 (model.std / 255).flatten().tolist())])

    def __len__(self):
        return len(self.episodes)

    def __getitem__(self, index):
        from PIL import Image
        episode = self.episodes[index]
        numbers = np.sort(np.random.choice(self.data.T, 5, replace=False))
        frames = [self.transform(Image.fromarray(frame))
                  for frame in self.data.frames(episode)[numbers]]
        return torch.stack(frames), self.sentences[self.data.task[episode]]["instruction"]


def training() -> dict:
    """Frames per second of a training step of the default run (40 videos, 5 frames of each)."""
    args, data, sentences, model = workload()
    for episode in data.select(split="train"):
        data.frames(episode)  # the buffer is full, as it is after the first steps of a run

    def ours():
        log = vlmrm.train(model, data_without_validation(data), sentences, vlmrm.triplet_loss,
                          steps=4, batch=40, learning_rate=1e-6, seed=0)
        ours.rates.append(200 / np.median([entry["seconds"] for entry in log]))
        return 800

    ours.rates = []
    pixels = torch.rand(200, 3, model.size, model.size, device=model.mean.device) * 2 - 1
    plain = vlmrm.prepare_model(args)
    plain.low_precision = False
    loader = torch.utils.data.DataLoader(
        FramesOneByOne(data, data.select(split="train"), sentences, plain), batch_size=40,
        shuffle=True, num_workers=2)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-6)

    def textbook(steps=3):
        for step, (frames, texts) in enumerate(loader):  # float32, and a caption for every frame
            frames = frames.to(plain.mean.device)
            images = F.normalize(plain.clip.encode_image(frames.flatten(0, 1)), dim=-1)
            captions = plain.tokenizer([text for text in texts for _ in range(5)])
            words = F.normalize(plain.clip.encode_text(captions.to(plain.mean.device)), dim=-1)
            loss = vlmrm.triplet_loss(images.unflatten(0, frames.shape[:2]),
                                      words.unflatten(0, frames.shape[:2])[:, 0], None)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step + 1 == steps:
                return 200 * steps

    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):  # no bars
        rates = in_turn(ours=ours, textbook=textbook,
                        bare=bare_tower(model, pixels, backward=True))
    return rates | {"ours": float(np.median(ours.rates[1:]))}  # of single steps


def data_without_validation(data):
    """The same data, whose validation episodes count as test: a step is timed, not its watching."""
    data = copy.copy(data)
    data.split = np.where(data.split == "validation", "test", data.split)
    return data


def evaluation() -> dict:
    """Frames per second of evaluate(), and seconds for pairwise accuracy of 10^6 frames."""
    _, data, sentences, model = workload()
    frames = len(data.select(split="test")) * data.T
    pixels = torch.rand(240, 3, model.size, model.size, device=model.mean.device) * 2 - 1

    def ours():
        data.frames.cache_clear()
        vlmrm.evaluate(model, data, sentences)
        return frames

    def bare():
        way = bare_tower(model, pixels, backward=False)
        return sum(way() for _ in range(frames // 240))

    rates = in_turn(ours=ours, bare=bare)
    rng = np.random.default_rng(0)
    values, rewards = rng.random((2, 10**6))
    began = time.perf_counter()
    vlmrm.pair_counts(values[None], rewards[None])
    rates["pairs_of_a_million_frames_seconds"] = time.perf_counter() - began
    n = 1000  # the double loop takes n^2: a million frames are 10^6 times the work of a thousand
    began = time.perf_counter()
    for a in range(n):
        for b in range(n):
            (rewards[a] - rewards[b] > 0.1) and (values[a] > values[b])
    rates["double_loop_of_a_million_frames_days"] = (time.perf_counter() - began) * 1e6 / 86400
    return rates


def default() -> dict:
    """The default run, three times: wall time, memory, and time until validation VOC is .90."""
    found = {"wall_seconds": [], "peak_gigabytes": [], "seconds_to_voc_90": [],
             "seconds_of_imports": []}
    for seed in range(3):
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            _, peak = measured("--seed", seed, "--runs", folder)
            found["wall_seconds"].append(time.perf_counter() - began)
            found["peak_gigabytes"].append(peak)
            report = Path(folder) / f"triplet-seed{seed}" / "metrics.json"
            before, passed = 0.0, None
            for entry in json.loads(report.read_text())["log"]:
                before += entry["seconds"]
                if passed is None and entry.get("validation_voc", 0) > 0.9:
                    passed = before
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import vlmrm"], cwd=HERE.parent, check=True)
        found["seconds_of_imports"].append(time.perf_counter() - began)
        found["seconds_to_voc_90"].append(passed and passed + found["seconds_of_imports"][-1])
    return found


def measured(*arguments, limit: float | None = None) -> tuple[float, float]:
    """Run vlmrm.py. Returns wall seconds and peak gigabytes of memory; limit is in gigabytes."""
    def set_limit():
        if limit:
            resource.setrlimit(resource.RLIMIT_DATA, (int(limit * 1e9),) * 2)

    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, str(HERE.parent / "vlmrm.py"), *map(str, arguments)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=set_limit)
    error = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(error)
    return time.perf_counter() - began, usage.ru_maxrss * 1024 / 1e9


def repeated(data, times: int, path: Path, size: int | None = None) -> None:
    """The data set with every episode several times over, or with pictures of another size."""
    from PIL import Image
    episodes = []
    for e in range(data.E):
        episode = data.episode(e)
        if size:
            frames = [np.asarray(Image.fromarray(frame).resize((size, size)))
                      for frame in data.frames(e)]
            episode["strip"] = vlmrm.encode_frames(np.stack(frames))
        episodes.append(episode)
    vlmrm.write_dataset(path, episodes * times)


def growth() -> dict:
    """Memory and time of a short run (20 steps, evaluation): more data, and larger pictures."""
    data = vlmrm.Dataset(HERE / "metaworld.npz")
    found = {"episodes": [], "size": []}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.npz"
        for key, settings in (("episodes", [(n, None) for n in (1, 2, 4, 8)]),
                              ("size", [(1, n) for n in (64, 96, 128, 192)])):
            for times, size in settings:
                repeated(data, times, path, size)
                seconds, peak = measured("--data", path, "--steps", 20, "--runs", folder)
                found[key].append({"x": size or times * data.E, "seconds": seconds,
                                   "peak_gigabytes": peak,
                                   "file_megabytes": path.stat().st_size / 1e6})
                print(key, found[key][-1], flush=True)
    return found


def large(limit: float = 3.0, file_gigabytes: float = 12.0) -> dict:
    """Train on a file several times as large as the memory that the process may have.

    Pictures of noise do not pack, and all but the first thousand episodes are for training.
    """
    rng, T, size = np.random.default_rng(0), 24, 96
    data = vlmrm.Dataset(HERE / "metaworld.npz")
    noise = [vlmrm.encode_frames(rng.integers(0, 256, (T, size, size, 3), dtype=np.uint8))
             for _ in range(20)]
    seen = [task for task in np.unique(data.task) if vlmrm.group_of(task) == "seen"]
    count = int(file_gigabytes * 1e9 / np.mean([len(strip) for strip in noise]))
    numbers = np.arange(count)
    lengths = np.array([len(strip) for strip in noise])[numbers % 20]
    fields = {"task": np.array(seen)[numbers % 40], "seed": numbers,
              "split": np.where(numbers < 500, "test", "train"),
              "source": np.full(count, "expert"), "rewards": np.zeros((count, T), np.float32),
              "success": np.ones((count, T), bool), "steps": np.tile(np.arange(T), (count, 1)),
              "offsets": np.r_[0, np.cumsum(lengths)]}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "large.npz"
        np.savez(path, **fields)
        with zipfile.ZipFile(path, "a") as archive, archive.open(
                "strips.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, {
                "descr": "|u1", "fortran_order": False, "shape": (int(lengths.sum()),)})
            for number in numbers:
                file.write(noise[number % 20])
        seconds, peak = measured("--data", path, "--runs", folder, limit=limit)
        return {"file_gigabytes": path.stat().st_size / 1e9, "limit_gigabytes": limit,
                "episodes": count, "peak_gigabytes": peak, "seconds": seconds}


PARTS = {part.__name__: part for part in (
    collection, training, evaluation, default, growth, large)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    chosen = parser.parse_args().parts or list(PARTS)
    path = HERE / "results" / "benchmark.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    for name in chosen:
        if name not in PARTS:
            parser.error(f"unknown part {name!r}; there are {', '.join(PARTS)}")
        found[name] = PARTS[name]()
        rates = found[name]
        print(name, json.dumps(rates, indent=1))
        for other in ("textbook", "bare"):
            if other in rates:
                print(f"{name}: ours is {rates['ours'] / rates[other]:.2f} times the {other}")
        found["machine"] = {
            "cores": os.cpu_count(), "torch": torch.__version__,
            "system": f"{platform.system()} {platform.machine()}",
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None}
        vlmrm.plumbing.write_json(path, found)


if __name__ == "__main__":
    main()
