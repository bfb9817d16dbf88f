"""A film of a plan that a model likes though it gets nothing done: reward hacking to watch.

    python data/study/film.py runs/triplet-seed0      writes data/results/exploited.gif

It replays a plan of guide.json that was found by maximising this model's reward. Under the pictures
are two rewards, the model's and the simulator's, as shares of how far they rise with experts.
"""
import io
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import common  # finds vlmrm

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

import vlmrm
from guide import load_models, random_numbers, rewards_of, rise
from planning import carry_out, look, open_scene
from workers import RESULTS

EVERY = 2  # steps from picture to picture

def most_exploited(plans: dict, row: str) -> str:
    """The name of the start from which the row's plan gets nothing done, though the simulator's
    reward finds one that does, and the row's share is furthest above the simulator's. Raises
    InputError if there is none."""
    gaps = {}
    for name, found in plans.items():
        plan = found[row]
        if found["simulator"]["done"] and not plan["done"] and "liked" in plan:
            gaps[name] = plan["liked"] - plan["said"]
    if not gaps:
        raise vlmrm.InputError(f"no plan of {row} fails where the simulator's succeeds")
    return max(gaps, key=gaps.get)

def draw_frame(picture: np.ndarray, curves: dict, now: int, title: str) -> Image.Image:
    """A picture over the curves up to now, PIL's. curves: {label: (colour, values)}."""
    figure = Figure(figsize=(4.8, 6.4), dpi=75, layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=(2, 1))
    above.imshow(picture)
    above.set_axis_off()
    above.set_title(title, fontsize=11)
    for label, (colour, values) in curves.items():
        steps = 1 + EVERY * np.arange(now + 1)
        below.plot(steps, values[:now + 1], color=colour, label=label)
    most = max(max(values) for _, values in curves.values())
    least = min(min(values) for _, values in curves.values())
    below.axhline(1, color="0.8", ls=":", zorder=0)
    below.set(xlim=(0, EVERY * len(values)), ylim=(least - 0.1, max(most, 1) + 0.1),
              xlabel="step", ylabel="rise (1: an expert's)")
    below.legend(loc="upper left", fontsize=9)
    png = io.BytesIO()
    figure.savefig(png)
    return Image.open(png).convert("P", palette=Image.Palette.ADAPTIVE, colors=128)

def replay(plan: list, scene: dict, row: tuple, sentence: str) -> tuple:
    """Carry out a plan: the poses after every second step, and the rises of the model's reward and
    of the simulator's at these, as shares of experts. row: (model, reward)."""
    outcome = carry_out(scene["env"], scene["state"], plan)
    if any(outcome["success"]):
        raise vlmrm.InputError("replayed on this machine, the plan gets it done")
    poses = outcome["poses"][::EVERY]
    small = look(scene["renderer"], scene["env"], poses)  # as the model sees it
    predicted = rewards_of(row, [[scene["picture"], *small]], sentence)[0]
    expected = rise(rewards_of(row, scene["experts"], sentence))
    true_rewards = np.array(outcome["rewards"][::EVERY]) - scene["rewards"][:, 0].mean()
    return poses, (predicted[1:] - predicted[0]) / expected, true_rewards / rise(scene["rewards"])

def draw_large(env, poses: list) -> np.ndarray:
    """Pictures of 384 x 384 pixels."""
    import mujoco  # not before: open_task() says which GL library it is to take
    env.model.vis.global_.offwidth = 384
    env.model.vis.global_.offheight = 384
    renderer = mujoco.Renderer(env.model, 384, 384)
    pictures = look(renderer, env, poses)
    renderer.close()
    return pictures

def work(args) -> None:
    """Write the film."""
    guide = vlmrm.read_json(args.guide)
    models = load_models([args.run], "cpu")
    row = next(iter(models))
    if guide["models"].get(row) != vlmrm.digest(args.run / "model.safetensors"):
        raise vlmrm.InputError(f"{args.guide} was made with another {row}")
    name = most_exploited(guide["plans"], row)
    task = name.split(",")[0]
    sentence = vlmrm.load_instructions(vlmrm.DATA / "instructions.json")[task]["instruction"]
    scene = open_scene(task, random_numbers(name))
    plan = guide["plans"][name][row]["plan"]
    poses, of_model, of_simulator = replay(plan, scene, models[row], sentence)
    scene["renderer"].close()

    curves = {f"reward of the model ({row})": ("#c8384e", of_model),
              "reward of the simulator": ("#30638e", of_simulator)}
    title = f"The task: {sentence}.\nThis plan was found by maximising the model's reward."
    frames = [draw_frame(picture, curves, k, title)
              for k, picture in enumerate(draw_large(scene["env"], poses))]
    frames += frames[-1:] * 15  # the end stays for a while
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=100, loop=0)
    vlmrm.write_whole(args.out, file.getvalue())
    print(f"{name}, {row}: see {args.out} ({len(file.getvalue()) / 1e6:.1f} MB)")

def parser() -> common.Parser:
    """The options."""
    options = common.Parser("film", description=__doc__)
    add = options.add_argument
    add("run", type=Path, help="the folder of the run whose plan it is")
    add("--guide", type=Path, default=RESULTS / "guide.json", help="(data/results/guide.json)")
    add("--out", type=Path, default=RESULTS / "exploited.gif", help="(data/results/exploited.gif)")
    return options

if __name__ == "__main__":
    sys.exit(common.main(parser(), work))
