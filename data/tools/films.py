"""Make a data set of one's own films.

    python data/tools/films.py films --sentences towel.json --out towel.npz
    python vlmrm.py --data towel.npz --instructions towel.json --runs runs/towel

films/fold-towel/*.mp4 show the task done (five are few, twenty better), films/fold-towel/failed/*
show it failing. Whatever imageio reads will do: mp4, gif, webm. towel.json has the sentences:

    {"fold-towel": {"instruction": "fold the towel", "paraphrases": ["fold up the towel",
     "put one half of the towel on the other", "make the towel half as large"]}}

Nobody knows the rewards: there is VOC, with failures success AUROC, and no ranking accuracy. Where
nothing moves VOC is the order of the compression's noise, anything from -1 to 1: leave such films
out. A film whose file was cut off looks like a short one.
"""
import common  # first: it knows where vlmrm.py is
import vlmrm

from pathlib import Path

import numpy as np
from tqdm import tqdm

STILL = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")

def read_film(path: Path, frames: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Pictures evenly spread over a film, uint8 (T, S, S, 3), and their numbers (T,). It is read
    twice, picture by picture: it may be too long for the memory. Raises InputError."""
    count = sum(1 for _ in common.read_pictures(path))
    if count < frames:
        raise vlmrm.InputError(f"{path} has {count} pictures, fewer than {frames}: lower --frames")
    steps = np.linspace(0, count - 1, frames).round().astype(int)
    kept = [np.asarray(picture.resize((size, size)))
            for k, picture in enumerate(common.read_pictures(path)) if k in steps]
    return np.stack(kept), steps

def list_films(folder: Path, left_out: list[Path]) -> list[tuple]:
    """The films of a task, (path, "expert" or "mixed") each. What is none is added to left_out:
    still pictures, hidden files, what show.py wrote, and folders but that of the failures."""
    films = []
    for path in sorted(folder.iterdir()):
        hidden = path.name.startswith(".")
        no_film = path.suffix.lower() in STILL or path.name.endswith("-reward.gif")
        if path.is_file() and not hidden and not no_film:
            films.append((path, "expert"))
        elif path.is_dir() and path.name.lower() == "failed":
            films += [(film, "mixed") for film, _ in list_films(path, left_out)]
        else:
            left_out.append(path)
    return films

def make_dataset(args) -> None:
    """Write the data set. Raises InputError."""
    common.check_outputs(args.out)
    tasks = {}
    left_out = []
    for folder in sorted(args.films.iterdir()):
        if folder.is_dir() and not folder.name.startswith("."):
            tasks[folder.name] = list_films(folder, left_out)
            if "expert" not in [source for _, source in tasks[folder.name]]:
                raise vlmrm.InputError(f"{folder} has no film of the task done")
        else:
            left_out.append(folder)
    if not tasks:
        raise vlmrm.InputError(f"{args.films} has no folders of tasks")
    common.check_names(tasks)
    vlmrm.load_instructions(args.sentences, tasks)
    if left_out:
        print(f"left out, as no films: {', '.join(map(str, left_out))}", flush=True)

    episodes = []
    for task, films in tasks.items():
        group = []
        for k, (path, source) in enumerate(tqdm(films, task, unit=" films")):
            pictures, steps = read_film(path, args.frames, args.size)
            success = np.full(args.frames, False)
            success[-1] = source == "expert"
            group.append({
                "task": task, "source": source, "seed": k, "steps": steps, "success": success,
                "rewards": np.zeros(args.frames), "strip": vlmrm.pack_pictures(pictures)})
        episodes += common.split_episodes(group)
    vlmrm.write_dataset(args.out, episodes)
    print(f"wrote {len(episodes)} films of {len(tasks)} tasks to {args.out}")

def main(argv: list[str] = None) -> int:
    parser = common.Parser("films", description=__doc__)
    add = parser.add_argument
    add("films", type=Path, help="a folder with a folder of each task")
    add("--sentences", type=Path, required=True, help="a JSON file")
    add("--out", type=Path, required=True, help="the data set, an npz file")
    add("--frames", type=int, default=24, help="of each film (24)")
    add("--size", type=int, default=96, help="pixels, square (96)")
    return common.main(parser, make_dataset, argv)

if __name__ == "__main__":
    raise SystemExit(main())
