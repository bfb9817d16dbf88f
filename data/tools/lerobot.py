"""LeRobot's data sets in, LeRobot's progress files out.

    python data/tools/lerobot.py read FOLDER --out mine.npz --sentences mine.json
    python vlmrm.py --data mine.npz --instructions mine.json --runs runs/mine
    python data/tools/lerobot.py progress runs/mine/triplet-seed0 FOLDER
    lerobot-train ... --sample_weighting.type=rabc --sample_weighting.head_mode=sparse

First pip install pyarrow. Versions 2.0, 2.1 and 3.0 will do, with films or with pictures in their
tables. Rewards are next.reward, or 0; an expert's next.success is true somewhere or not told at
all. Mind that both tell of the step that begins at the picture.
"""
import common  # first: it knows where vlmrm.py is
import vlmrm

import functools
import io
import itertools
import json
import re
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

COLUMNS = {  # of a table, and the kinds of numpy that they may have
    "index": "iu", "episode_index": "iu", "frame_index": "iu",
    "timestamp": "f", "next.reward": "fiu", "next.success": "b"}

@functools.lru_cache(maxsize=1)  # v3.0: the next episode is mostly in the same file
def read_table(path: Path, *names: str):
    """A pyarrow table of those of the columns that a parquet file has. Raises InputError."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise vlmrm.InputError("LeRobot's tables are parquet files: pip install pyarrow") from None
    with vlmrm.reading(path):
        return pyarrow.parquet.ParquetFile(path).read(list(names))

def read_columns(path: Path, begin: int, number: int, index, fps: float) -> dict:
    """The columns of an episode in its table, {name: (T,)}, once they are as they should be: index
    as given, rows from `begin` on. Raises InputError."""
    table = read_table(path, *COLUMNS)
    steps = np.arange(len(index))
    columns = {"index": index, "episode_index": number + 0 * steps, "frame_index": steps,
               "timestamp": steps / fps,  # seconds
               "next.reward": 0.0 * steps, "next.success": steps == steps[-1]}
    with vlmrm.reading(path):
        own = np.flatnonzero(table["episode_index"].to_numpy() == number)
        if not np.array_equal(own, begin + steps):
            raise ValueError(f"episode {number} is not {len(steps)} rows from row {begin} on")
        for name in table.column_names:
            values = table[name].slice(begin, len(steps)).to_numpy()
            if values.dtype.kind not in COLUMNS[name] or not np.isfinite(values).all():
                raise ValueError(f"{name} of episode {number} is {values.dtype}, or not finite")
            if name.startswith("next."):
                columns[name] = values
            elif not np.allclose(values, columns[name], rtol=0, atol=1e-3):
                raise ValueError(f"{name} of episode {number} does not count on")
    return columns

def read_rows(folder: Path, info: dict, films: str) -> list[dict]:
    """What the meta data say of each episode. films: "videos/CAMERA/". Raises ValueError."""
    version = info["codebase_version"]
    rows = []
    if version == "v3.0":
        names = ["episode_index", "length", "tasks", "data/chunk_index", "data/file_index"]
        for name in ("chunk_index", "file_index", "from_timestamp", "to_timestamp"):
            names.append(films + name)
        for file in sorted(folder.glob("meta/episodes/*/*.parquet")):
            rows += read_table(file, *names).to_pylist()
    elif version in ("v2.0", "v2.1"):
        lines = (folder / "meta/episodes.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
    else:
        raise ValueError(f"its version is {version}, not v2.0, v2.1 or v3.0")
    numbers = {row["episode_index"] for row in rows}
    if not 0 < len(rows) == len(numbers) == info["total_episodes"]:
        raise ValueError(f"it has {info['total_episodes']} episodes, its folder {len(numbers)}")
    return rows

def locate(folder: Path, info: dict, rows: list[dict], kind: str) -> dict[Path, int]:
    """Put into each row "path", its table (kind "data/") or film (kind "videos/CAMERA/"), and
    "begin", where it begins there. {path: how long it is}. Raises ValueError."""
    template = info["data_path" if kind == "data/" else "video_path"]
    ends = {}
    for row in rows:
        number = row["episode_index"]
        # Paths are made of the number, or in v3.0 of columns such as data/file_index.
        names = {name.removeprefix(kind): value for name, value in row.items()}
        names["episode_chunk"] = number // info.get("chunks_size", 1000)
        names["video_key"] = kind.split("/")[1]
        path = folder / template.format(**names)
        begin = ends.get(path, 0)
        ends[path] = begin + row["length"]
        if info["codebase_version"] == "v3.0" and kind != "data/":
            seconds = np.array([row[kind + "from_timestamp"], row[kind + "to_timestamp"]])
            if not np.array_equal(np.rint(seconds * info["fps"]), [begin, ends[path]]):
                raise ValueError(f"with fps {info['fps']} episode {number} is not at {seconds} s, "
                                 f"but pictures {begin} to {ends[path]}")
        row.update(path=path, begin=begin)
    return ends

def list_episodes(folder: Path, camera: str = None, limit: int = None) -> list[dict]:
    """All about every episode, or the first few, but its pictures. Raises InputError."""
    read_table.cache_clear()  # files may have changed
    settings = folder / "meta/info.json"
    info = vlmrm.read_json(settings)
    with vlmrm.reading(settings):
        kinds = {name: feature["dtype"] for name, feature in info["features"].items()
                 if feature["dtype"] in ("image", "video")}
        chosen = [name for name in kinds if camera in (None, name, name.split(".")[-1])]
        if len(chosen) != 1:
            raise vlmrm.InputError(f"choose a --camera: {folder} has {', '.join(kinds) or 'none'}")
        films = f"videos/{chosen[0]}/"
        rows = read_rows(folder, info, films)
        ends = locate(folder, info, rows, "data/")
        index = 0
        for row in tqdm(rows[:limit], "listing", leave=False):
            row["sentence"] = " ".join(" ".join(row["tasks"]).split())
            if len(row["tasks"]) != 1 or not row["sentence"]:
                raise ValueError(f"an episode has not one sentence but {row['tasks']}")
            row["columns"] = read_columns(row["path"], row["begin"], row["episode_index"],
                                          index + np.arange(row["length"]), info["fps"])
            row["expert"] = bool(row["columns"]["next.success"].any())
            index += row["length"]
        if kinds[chosen[0]] == "video":
            ends = locate(folder, info, rows, films)
        for row in rows:
            row["camera"] = chosen[0]
            row["last"] = row["begin"] + row["length"] == ends[row["path"]]
    return rows[:limit]

def read_cells(path: Path, camera: str):
    """Yield the pictures in a table. Raises InputError."""
    with vlmrm.reading(path):
        for cell in read_table(path, camera)[camera]:
            yield Image.open(io.BytesIO(cell["bytes"].as_py()))  # unpacked if it is wanted

def look(episodes: list[dict], size: int, count: int = None):
    """Yield of each episode: itself, steps of it (all, or a count, evenly), and the pictures there,
    uint8 (T, S, S, 3). Raises InputError."""
    opened = None
    for episode in tqdm(episodes, "looking"):
        path = episode["path"]
        if path != opened:  # else we go on where we are in it
            opened = path
            pictures = common.read_pictures(path)
            if path.suffix == ".parquet":
                pictures = read_cells(path, episode["camera"])
            pictures = itertools.islice(pictures, episode["begin"], None)
        last = episode["length"] - 1
        steps = np.linspace(0, last, count or last + 1).round().astype(int)
        kept = []
        for step in range(last + 1):
            picture = next(pictures, None)
            if not picture:
                raise vlmrm.InputError(f"{path} ends in episode {episode['episode_index']}")
            if step in steps:
                with vlmrm.reading(path):
                    kept.append(np.asarray(common.to_rgb(picture).resize((size, size))))
        if episode["last"] and next(pictures, None):
            raise vlmrm.InputError(f"{path} has more pictures than its episodes")
        yield episode, steps, np.stack(kept)

def name_tasks(episodes: list[dict]) -> dict[str, str]:
    """{sentence: the name of its task}, another one for each."""
    names = {}
    for sentence in dict.fromkeys(episode["sentence"] for episode in episodes):
        name = re.sub(r"\W+", "-", sentence.lower()).strip("-")
        # "Go up!" is not "go up". A task that nobody trains on is none of these.
        while not name or name in names.values() or vlmrm.group_of(name) == "unseen":
            name += "-2"
        names[sentence] = name
    return names

def read(args) -> None:
    """Write a data set and its sentences, as vlmrm.py takes them. Raises InputError."""
    if args.episodes is not None and args.episodes < 1:
        raise vlmrm.InputError(f"--episodes {args.episodes} is none")
    common.check_outputs(args.out, args.sentences)
    episodes = list_episodes(args.folder, args.camera, args.episodes)
    shortest = min(episode["length"] for episode in episodes)
    if shortest < args.frames:
        raise vlmrm.InputError(f"an episode has only {shortest} pictures: lower --frames")
    names = name_tasks(episodes)
    groups = {task: [] for task in names.values()}
    for episode, steps, pictures in look(episodes, args.size, args.frames):
        task = names[episode["sentence"]]
        columns = episode["columns"]
        since = np.minimum(np.r_[0, steps[:-1] + 1], steps)  # has any step since then succeeded?
        groups[task].append({
            "task": task, "source": "expert" if episode["expert"] else "mixed", "steps": steps,
            "seed": episode["episode_index"], "strip": vlmrm.pack_pictures(pictures),
            "rewards": np.float32(columns["next.reward"])[steps],
            "success": np.logical_or.reduceat(columns["next.success"], since)})
    dataset = sum(map(common.split_episodes, groups.values()), [])
    vlmrm.write_dataset(args.out, dataset)
    instructions = {task: {"instruction": sentence, "paraphrases": [sentence] * 3}
                    for sentence, task in names.items()}
    vlmrm.write_whole(args.sentences, vlmrm.to_json(instructions))
    print(f"wrote {len(dataset)} episodes; {args.sentences} repeats each sentence as paraphrases")

def progress(args) -> None:
    """Write the reward of every picture as progress: under a sentence the mean of its experts'
    first pictures is 0, of their last 1. Not in an episode: there the best of a failure would be 1
    too. Raises InputError."""
    out = args.folder / "sarm_progress.parquet"
    common.check_outputs(out)
    model = vlmrm.load_reward_model(args.run)
    episodes = list_episodes(args.folder, args.camera)
    ends = {episode["sentence"]: [] for episode in episodes if episode["expert"]}
    for episode in episodes:
        model.check_sentence(episode["sentence"])
        if episode["sentence"] not in ends:
            raise vlmrm.InputError(f"{episode['sentence']!r} has no expert to show 0 and 1")
    for episode, _, pictures in look(episodes, args.size):
        episode["rewards"] = model.score(pictures, episode["sentence"])
        if episode["expert"]:
            ends[episode["sentence"]].append(episode["rewards"][[0, -1]])
    for episode in episodes:
        zero, one = np.mean(ends[episode["sentence"]], axis=0)
        if zero >= one:
            raise vlmrm.InputError(f"no rise in the rewards of experts: {episode['sentence']!r}")
        share = (episode["rewards"] - zero) / (one - zero)
        episode["columns"]["progress_sparse"] = np.float32(share).clip(0, 1)

    import pyarrow.parquet  # list_episodes() needed it, too
    columns = {name: np.concatenate([episode["columns"][name] for episode in episodes])
               for name in ("index", "episode_index", "frame_index", "progress_sparse")}
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    vlmrm.write_whole(out, file.getvalue())
    print(f"wrote {out}")

def main(argv: list[str] = None) -> int:
    parser = common.Parser("lerobot", description=__doc__)
    modes = parser.add_subparsers(required=True, metavar="read|progress")
    reading = modes.add_parser("read", help="make a data set")
    writing = modes.add_parser("progress", help="score every picture")
    writing.add_argument("run", type=Path, help="a trained model, such as runs/triplet-seed0")
    for mode, work in ((reading, read), (writing, progress)):
        mode.set_defaults(work=work)
        mode.add_argument("folder", type=Path, help="a LeRobotDataset")
        mode.add_argument("--camera", help="which, if it has several")
        mode.add_argument("--size", type=int, default=96, help="of pictures, square (96)")
    add = reading.add_argument
    add("--out", type=Path, required=True, help="the data set to write, an npz file")
    add("--sentences", type=Path, required=True, help="its sentences, a JSON file to write")
    add("--frames", type=int, default=24, help="of each episode (24)")
    add("--episodes", type=int, help="only so many, the first (all)")
    return common.main(parser, lambda args: args.work(args), argv)

if __name__ == "__main__":
    raise SystemExit(main())
