"""The rewards of a film, in numbers and as a film with its reward under it.

    python data/tools/show.py runs/triplet-seed0 clip.mp4 "close the drawer"

prints the reward of each picture and writes clip-reward.gif. A picture or a folder of numbered
pictures will do too. Each sentence gets a column and a curve. With --out reward.mp4 it becomes a
film of that name and kind. It shows eight pictures a second, all that there are: cut a long film
first.
"""
import common  # first: it knows where vlmrm.py is
import vlmrm

import io
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from tqdm import tqdm

WIDTH = 480  # pixels, of the film

def score(model, path: Path, sentence: str) -> list[float]:
    """The rewards of all pictures (T,). Raises InputError."""
    rewards = [model.score(np.asarray(picture)[None], sentence).item()
               for picture in tqdm(common.read_pictures(path), sentence, unit=" pictures")]
    if not rewards:
        raise vlmrm.InputError(f"{path} has no pictures in it")
    return rewards

def print_rewards(rewards: dict[str, list[float]]) -> None:
    """A line for each picture, a column for each sentence, and their VOC."""
    for k, values in enumerate(zip(*rewards.values())):
        print(f"picture {k:5}   " + "   ".join(f"{value:7.4f}" for value in values))
    for sentence, values in rewards.items():
        voc = vlmrm.value_order_correlation(np.array(values))
        print(f"VOC {voc:.2f} (1: rises all along) under {sentence!r}")

def draw_curves(rewards: dict[str, list[float]]) -> tuple[np.ndarray, np.ndarray]:
    """A picture of the curves, uint8 (240, WIDTH, 3), and the column in it of each reward (T,)."""
    figure = Figure(figsize=(WIDTH / 100, 2.4), dpi=100, layout="constrained")
    axis = figure.subplots()
    for sentence, values in rewards.items():
        axis.plot(values, marker=".", label=sentence.replace("$", r"\$"))
    axis.set(xlabel="picture", ylabel="reward")
    axis.legend(fontsize=8)
    png = io.BytesIO()
    figure.savefig(png)
    columns = axis.transData.transform([(k, 0) for k in range(len(values))])[:, 0]
    return np.asarray(Image.open(png).convert("RGB")), columns.round().astype(int)

def compose(path: Path, rewards: dict[str, list[float]]):
    """Yield each picture over the curves, PIL's, WIDTH wide; what is to come of them is pale."""
    curves, columns = draw_curves(rewards)
    size = None  # of the first picture, in blocks of 16, which films want; others are fitted in
    for picture, column in zip(common.read_pictures(path), columns):
        size = size or (WIDTH, 16 * max(1, round(WIDTH / 16 * picture.height / picture.width)))
        under = curves.copy()
        to_come = under[:, column + 4:columns[-1] + 5]
        to_come[:] = 255 - (255 - to_come) // 5
        above = ImageOps.pad(picture, size)
        yield Image.fromarray(np.concatenate([np.asarray(above), under]))

def show(args) -> None:
    """Write the film. Raises InputError."""
    path = args.film.absolute()
    out = args.out or path.with_name(f"{path.stem}-reward.gif")
    if out.suffix.lower() not in (".gif", ".mp4"):
        raise vlmrm.InputError(f"{out} must end with .gif or .mp4")
    common.check_outputs(out)
    model = vlmrm.load_reward_model(args.run)
    rewards = {sentence: score(model, path, sentence) for sentence in args.instruction}
    print_rewards(rewards)
    frames = compose(path, rewards)
    file = io.BytesIO()
    if out.suffix.lower() == ".gif":  # 120 ms each, over and over
        next(frames).save(file, "GIF", save_all=True, append_images=frames, duration=120, loop=0)
    else:
        imageio.imwrite(file, map(np.asarray, frames), extension=".mp4", is_batch=True, fps=8)
    vlmrm.write_whole(out, file.getvalue())
    print(f"see {out}")

def main(argv: list[str] = None) -> int:
    parser = common.Parser("show", description=__doc__)
    add = parser.add_argument
    add("run", type=Path, help="such as runs/triplet-seed0")
    add("film", type=Path, help="mp4, gif, webm, ..., a picture, or a folder of pictures")
    add("instruction", nargs="+", help="what it should show")
    add("--out", type=Path, help="an mp4 or gif (the film's name, with -reward.gif)")
    return common.main(parser, show, argv)

if __name__ == "__main__":
    raise SystemExit(main())
