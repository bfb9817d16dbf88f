"""How fast is vlmrm.py, beside the bare tower or renderer?

    python data/study/benchmark.py              some minutes on two cores
    python data/study/benchmark.py training     one part: collection, training, evaluation, agent

agent takes the package stable-baselines3.

Machines are noisy: what is compared is measured in turn, A B A B, in one process; kept are medians,
in data/results/benchmark.json.
"""
import json
import os
import platform
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import common  # finds vlmrm

import numpy as np
import torch

import vlmrm

ROUNDS = 7

def in_turn(**ways) -> dict:
    """Median units per second of each way, measured in turn. A way is a function that does some
    work and returns how many units it did; its first call only warms up."""
    rates = {name: [] for name in ways}
    for _ in range(1 + ROUNDS):
        for name, way in ways.items():
            began = time.perf_counter()
            done = way()
            rates[name].append(done / (time.perf_counter() - began))
    return {name: float(np.median(found[1:])) for name, found in rates.items()}

def collection() -> dict:
    """Pictures of 96 x 96 per second, on one core, one task: of 40 steps that are all drawn; and of
    an episode of which the data set keeps 24 of 150 steps."""
    rng = np.random.default_rng(0)
    env, policy, renderer = vlmrm.open_task("drawer-open-v3", 96)

    def ours(steps=40, kept=40):  # as collect_task() does it: simulate, then draw and pack
        history = vlmrm.roll_out(env, policy(), rng, steps, noise=0.5, random_share=0.0)
        chosen = np.linspace(0, steps - 1, kept).astype(int)
        vlmrm.pack_pictures([vlmrm.draw(renderer, env.data, history[k][0]) for k in chosen])
        return kept

    def ours_24_of_150():
        return ours(150, 24)

    def bare():
        for _ in range(40):
            renderer.render()
        return 40

    rates = in_turn(ours=ours, ours_24_of_150=ours_24_of_150, bare=bare)
    renderer.close()
    return rates

def default_run():
    """The configuration, data, instructions and model of the default run."""
    args = vlmrm.parse_arguments([])
    config = vlmrm.configuration(args, "triplet", 0)
    data = vlmrm.Dataset(args.data)
    instructions = vlmrm.load_instructions(args.instructions, data.task)
    return config, data, instructions, vlmrm.prepare_model(config)

def bare_tower(model, batch: int, backward: bool) -> int:
    """The vision tower alone, on pixels that are ready."""
    pixels = torch.rand(batch, 3, model.size, model.size, device=model.mean.device) * 2 - 1
    with torch.set_grad_enabled(backward):
        features = model.encode(model.clip.encode_image, pixels)
        if backward:
            features.sum().backward()
            model.zero_grad(set_to_none=True)
    features[0, 0].item()  # waits for a GPU
    return batch

def training() -> dict:
    """Pictures per second of a training step of the default run (40 videos, 5 of each)."""
    config, data, instructions, model = default_run()
    config |= {"steps": 4, "learning_rate": 1e-6}
    began = []

    def loss(frames, texts, times):
        began.append(time.perf_counter())
        return vlmrm.triplet_loss(frames, texts, times)

    def ours():  # its rate is that of the steps: the pictures are unpacked once, before the first
        vlmrm.train(model, data, instructions, loss, config)
        return 800

    def bare():
        return bare_tower(model, 200, backward=True)

    rates = in_turn(ours=ours, bare=bare)
    steps = np.diff(began)[np.arange(len(began) - 1) % 4 != 3]  # not from one run to the next
    rates["ours"] = float(200 / np.median(steps))
    return rates

def evaluation() -> dict:
    """Pictures per second of evaluate()."""
    _, data, instructions, model = default_run()
    count = len(data.select(split="test")) * data.T

    def ours():
        vlmrm.evaluate(model, data, instructions)
        return count

    def bare():
        return sum(bare_tower(model, 240, backward=False) for _ in range(count // 240))

    return in_turn(ours=ours, bare=bare)

def agent() -> dict:
    """Steps per second of PPO in drawer-close under a model's reward, its pictures drawn by draw()
    or by env.render(); and scores per second of one picture."""
    try:
        from stable_baselines3 import PPO
    except ImportError:
        raise vlmrm.InputError("the part agent takes: pip install stable-baselines3") from None
    from environment import wrap_environment
    _, data, _, model = default_run()
    vlmrm.merge_lora(model)
    model.eval().requires_grad_(False)
    simulator, _, renderer = vlmrm.open_task("drawer-close-v3", 96)
    simulator.render_mode = "rgb_array"
    sentence = "close the drawer"

    def learn(env):
        PPO("MlpPolicy", env, n_steps=32, batch_size=32, device="cpu").learn(32)
        return 32

    def ours():
        return learn(wrap_environment(
            simulator, model, sentence, render=lambda: vlmrm.draw(renderer, simulator.data, {})))

    def own_renderer():
        return learn(wrap_environment(simulator, model, sentence))

    def score():
        for picture in data.pictures(0):
            model.score(picture[None], sentence)
        return data.T

    rates = in_turn(ours=ours, score=score)
    renderer.close()  # or the other one's pictures are old ones
    return rates | in_turn(own_renderer=own_renderer)

PARTS = {"collection": collection, "training": training, "evaluation": evaluation, "agent": agent}

def work(args) -> None:
    """Measure these parts. What is known of the others stays."""
    path = args.results / "benchmark.json"
    found = vlmrm.read_json(path) if path.exists() else {}
    for name in args.parts or PARTS:
        if name not in PARTS:
            raise vlmrm.InputError(f"{name} is none of {', '.join(PARTS)}")
        found[name] = PARTS[name]()
        print(name, json.dumps(found[name], indent=1), flush=True)
        found["machine"] = {"cores": os.cpu_count(), "torch": torch.__version__,
                            "system": f"{platform.system()} {platform.machine()}"}
        vlmrm.write_whole(path, vlmrm.to_json(found))

def parser() -> common.Parser:
    """The options."""
    options = common.Parser("benchmark", description=__doc__)
    options.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    options.add_argument("--results", type=Path, default=vlmrm.DATA / "results", help="a folder")
    return options

if __name__ == "__main__":
    sys.exit(common.main(parser(), work))
