"""The rewards of a film, in numbers and as a film with its reward under it; or a page with the test
episodes of a run.

    python data/tools/show.py runs/triplet-seed0 clip.mp4 "close the drawer"
    python data/tools/show.py runs/triplet-seed0

The first command prints the reward of each picture and writes clip-reward.gif. A picture or a
folder of numbered pictures will do too. Each sentence gets a column and a curve. With --out
reward.mp4 it becomes a film of that name and kind. It shows eight pictures a second, all that there
are: cut a long film first. The second one writes runs/triplet-seed0/page.html: an episode, a slider
over its pictures, its rewards under each sentence. It is one file that any browser opens.
"""
import common  # first: it knows where vlmrm.py is
import vlmrm

import base64
import io
import json
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from tqdm import tqdm

WIDTH = 480  # pixels, of the film
MOST = 40  # episodes on a page

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

def choose_episodes(data, tested: list[int]) -> list[int]:
    """The first expert and the first failure of each task, unseen tasks first: MOST of them."""
    chosen = []
    for group in ("unseen", "seen"):
        for task in sorted(set(data.task[tested].tolist())):
            if vlmrm.group_of(task) != group:
                continue
            here = [e for e in tested if data.task[e] == task]
            experts = [e for e in here if data.source[e] == "expert"]
            failures = [e for e in here if not data.success[e].any()]
            chosen += experts[:1] + failures[:1]
    return chosen[:MOST]

def curves_of(model, pictures: np.ndarray, instructions: dict, task: str) -> dict[str, list]:
    """The rewards of pictures under the sentence of a task, the opposite one, and a paraphrase."""
    entry = instructions[task]
    sentences = {f"“{entry['instruction']}”": entry["instruction"]}
    opposite = entry.get("opposite")
    if opposite:
        sentence = instructions[opposite]["instruction"]
        sentences[f"the opposite, “{sentence}”"] = sentence
    sentences[f"a paraphrase, “{entry['paraphrases'][0]}”"] = entry["paraphrases"][0]
    frames = model.embed_frames(pictures).cpu()  # (T, D)
    texts = model.embed_texts(list(sentences.values())).cpu()
    return {what: vlmrm.cosine(frames, text).tolist() for what, text in zip(sentences, texts)}

@torch.inference_mode()
def draw_page(args) -> None:
    """Write the page, as page.html into the folder of the run. Raises InputError."""
    run = args.run
    out = args.out or run / "page.html"
    if out.suffix.lower() != ".html":
        raise vlmrm.InputError(f"{out} must end with .html, or name a film to draw")
    if args.out:  # the run's own page is drawn anew
        common.check_outputs(out)
    model = vlmrm.load_reward_model(run)
    config = vlmrm.read_json(run / "config.json")
    data = vlmrm.Dataset(config["data"])
    if vlmrm.digest(data.path) != config["sha256"]["data"]:
        raise vlmrm.InputError(f"{data.path} has changed since this run")
    instructions = vlmrm.load_instructions(config["instructions"], data.task)
    with vlmrm.reading(run / "metrics.json"):
        tested = [int(e) for e in vlmrm.read_json(run / "metrics.json")["predicted"]]
    episodes = []
    for e in tqdm(choose_episodes(data, tested), "episodes"):
        task = data.task[e]
        strip = data.strips[data.offsets[e]:data.offsets[e + 1]].tobytes()
        outcome = "succeeds" if data.success[e].any() else "fails"
        episodes.append({
            "name": f"{task}, {vlmrm.group_of(task)} task: {data.source[e]}, {outcome}",
            "strip": "data:image/webp;base64," + base64.b64encode(strip).decode(),
            "curves": curves_of(model, data.pictures(e), instructions, task),
            "simulator": data.rewards[e].tolist()})
    title = f"{run.resolve().name}: {len(episodes)} of {len(tested)} test episodes"
    vlmrm.write_whole(out, page_of({"title": title, "episodes": episodes}).encode())
    print(f"open {out} in a browser")

def page_of(content: dict) -> str:
    """The page that shows it: see page.html. No name or sentence in it can end the script."""
    page = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return page.replace("/*DATA*/", json.dumps(content).replace("<", "\\u003c"))

def work(args) -> None:
    """Write the film, or the page. Raises InputError."""
    if args.film is None:
        draw_page(args)
    elif not args.instruction:
        raise vlmrm.InputError("under which sentence? Add one, such as \"close the drawer\"")
    else:
        show(args)

def main(argv: list[str] = None) -> int:
    parser = common.Parser("show", description=__doc__)
    add = parser.add_argument
    add("run", type=Path, help="such as runs/triplet-seed0")
    add("film", type=Path, nargs="?", help="mp4, gif, webm, ..., a picture, a folder of pictures")
    add("instruction", nargs="*", help="what it should show")
    add("--out", type=Path, help="an mp4 or gif (the film's name, with -reward.gif), or an html")
    parser.parse_args = parser.parse_intermixed_args  # options may stand before a sentence
    return common.main(parser, work, argv)

if __name__ == "__main__":
    raise SystemExit(main())
