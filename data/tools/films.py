"""Make a data set of one's own films. It stays beside vlmrm.py because that reads data sets alone.

    python data/films.py films --sentences towel.json --out towel.npz
    python vlmrm.py --data towel.npz --instructions towel.json --batch 1 --runs runs/towel

films/fold-towel/*.mp4 show the task done (five are few, twenty better), films/fold-towel/failed/
hold films in which it is not. Whatever imageio reads will do: mp4, gif, webm. towel.json has each
task's sentences: {"fold-towel": {"instruction": "fold the towel", "paraphrases": ["put one half of
the towel on the other", "fold up the towel", "make the towel half as large"]}}. Nobody knows the
rewards, so there is no ranking accuracy: VOC needs none, and with failures there is success AUROC.
"""
import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import vlmrm  # before torch: see there

import imageio.v3 as imageio
import numpy as np
from PIL import Image
from tqdm import tqdm

def read_film(path: Path, frames: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Frames evenly spread over a film, uint8 (T, S, S, 3), and their numbers (T,)."""
    with vlmrm.reading(path):
        count = sum(1 for _ in imageio.imiter(path))  # a film may be too long for the memory
        if count < frames:
            raise ValueError(f"it has {count} frames, fewer than {frames}: lower --frames")
        steps = np.linspace(0, count - 1, frames).round().astype(int)
        kept = [Image.fromarray(frame).convert("RGB").resize((size, size))
                for k, frame in enumerate(imageio.imiter(path)) if k in steps]
    return np.stack(kept), steps

def read_task(folder: Path, args: argparse.Namespace, bar: tqdm) -> list[dict]:
    """The episodes of one task: experts, and `mixed` ones that fail."""
    episodes = []
    for source, place in (("expert", folder), ("mixed", folder / "failed")):
        files = sorted(path for path in place.glob("*") if path.is_file())
        for k, path in enumerate(files):
            frames, steps = read_film(path, args.frames, args.size)
            episodes.append({
                "task": folder.name, "source": source, "seed": k, "steps": steps,
                "rewards": np.zeros(args.frames), "strip": vlmrm.encode_frames(frames),
                "success": (np.arange(args.frames) == args.frames - 1) & (source == "expert")})
            bar.update()
    if not any(episode["source"] == "expert" for episode in episodes):
        raise vlmrm.InputError(f"{folder} has no film of the task done")
    return vlmrm.assign_splits(episodes)

def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("films", type=Path, help="a folder with a folder of each task")
    add("--sentences", type=Path, required=True, help="a JSON file")
    add("--out", type=Path, required=True, help="the data set, an npz file")
    add("--frames", type=int, default=24, help="of each film (24)")
    add("--size", type=int, default=96, help="pixels, square (96)")
    args = parser.parse_args()
    try:
        folders = sorted(path for path in args.films.glob("*") if path.is_dir())
        if not folders or args.frames < 5:
            raise vlmrm.InputError(f"{args.films} has no folders of tasks, or --frames is below 5")
        vlmrm.load_instructions(args.sentences, [folder.name for folder in folders])
        with tqdm(desc="reading films", unit=" films") as bar:
            episodes = [episode for folder in folders for episode in read_task(folder, args, bar)]
        vlmrm.write_dataset(args.out, episodes)
    except (vlmrm.InputError, OSError) as problem:
        print("films:", problem, file=sys.stderr)
        return 2
    print(f"wrote {len(episodes)} films of {len(folders)} tasks to {args.out}")
    return 0

if __name__ == "__main__":
    sys.exit(main())
