"""A film of an episode with its reward under it, as people show them. It stays beside vlmrm.py
because the lesson looks at pictures that stand still.

    python data/show.py runs/triplet-seed0 clip.mp4 "close the drawer"       writes clip-reward.gif

A sentence for each curve. With --out reward.mp4 it becomes a film of that name and kind. It shows
eight pictures a second, all that the film has: cut a long one first.
"""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import vlmrm  # before torch: see there

import imageio.v3 as imageio
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm

WIDTH = 480  # pixels, of the film

def read_film(path: Path) -> list[Image.Image]:
    """Its pictures, WIDTH wide, their height a multiple of 16, as films want it."""
    with vlmrm.reading(path):
        pictures = [Image.fromarray(frame).convert("RGB") for frame in imageio.imiter(path)]
        height = max(1, round(WIDTH / 16 * pictures[0].height / pictures[0].width)) * 16
        return [picture.resize((WIDTH, height)) for picture in pictures]

def draw_curves(rewards: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """A picture of curves (T,), uint8 (240, WIDTH, 3), and the column in it of each frame (T,)."""
    figure = Figure(figsize=(WIDTH / 100, 2.4), dpi=100, layout="constrained")
    canvas, axis = FigureCanvasAgg(figure), figure.subplots()
    for text, values in rewards.items():
        axis.plot(values, label=text.replace("$", r"\$"))
    axis.set(xlabel="frame", ylabel="reward")
    axis.legend(fontsize=8)
    canvas.draw()
    places = axis.transData.transform([(k, 0) for k in range(len(values))])[:, 0]
    return np.asarray(canvas.buffer_rgba())[..., :3], places.round().astype(int)

def film(pictures: list, rewards: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Each picture over the curves, uint8 (H + 240, WIDTH, 3); what is to come of them is pale."""
    curves, places = draw_curves(rewards)
    frames, edge = [], places[-1]
    for picture, x in zip(pictures, places):
        under = curves.copy()
        under[:, x + 2:edge + 2] = 255 - (255 - under[:, x + 2:edge + 2]) // 5
        frames.append(np.concatenate([np.asarray(picture), under]))
    return frames

def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("run", type=Path, help="such as runs/triplet-seed0")
    add("film", type=Path, help="mp4, gif, webm, ...")
    add("instruction", nargs="+", help="what the film should show")
    add("--out", type=Path, help="an mp4 or gif (the film's name, with -reward.gif)")
    args = parser.parse_args()
    out = args.out or args.film.with_name(f"{args.film.stem}-reward.gif")
    try:
        vlmrm.check_cosine(args.run)
        pictures, model = read_film(args.film), vlmrm.load_reward_model(args.run)
        rewards = {text: np.concatenate([model.score(np.asarray(picture)[None], text)
                                         for picture in tqdm(pictures, text)])
                   for text in args.instruction}
        speed = {"duration": 125} if out.suffix == ".gif" else {"fps": 8}  # 8 pictures a second
        imageio.imwrite(out, film(pictures, rewards), **speed)
    except (vlmrm.InputError, OSError, ValueError) as problem:
        print("show:", " ".join(str(problem).split()), file=sys.stderr)
        return 2
    print(f"see {out}")
    return 0

if __name__ == "__main__":
    sys.exit(main())
