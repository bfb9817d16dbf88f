"""LeRobot's data sets in, LeRobot's progress files out. It stays beside vlmrm.py because the lesson
needs neither: it is for whoever has robot data in LeRobot's form, or trains a policy with LeRobot.

    python data/lerobot_data.py read FOLDER --out mine.npz --sentences mine.json
    python vlmrm.py --data mine.npz --instructions mine.json --batch 2 --runs runs/mine
    python data/lerobot_data.py progress runs/mine/triplet-seed0 FOLDER
    lerobot-train ... --sample_weighting.type=rabc --sample_weighting.head_mode=sparse

First pip install pyarrow. Rewards are next.reward, or 0; an expert's next.success is true somewhere
or not told at all. Mind that both tell of the step that begins at the picture.
"""
import argparse
import functools
import io
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import vlmrm  # before torch: see there
import imageio.v3 as imageio
import numpy as np
from PIL import Image
from tqdm import tqdm

@functools.lru_cache(maxsize=1)  # v3.0: the next episode is mostly in the same file
def read_table(path: Path, *names: str):
    """A pyarrow table of those of the columns that a parquet file has. Raises InputError."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise vlmrm.InputError("LeRobot's tables are parquet files: pip install pyarrow") from None
    with vlmrm.reading(path):
        return pyarrow.parquet.ParquetFile(path).read(list(names))

def read_frames(row: dict) -> tuple[int, dict, bool]:
    """Where in its table an episode begins, its columns, {name: (T,)}, and is it an expert's?"""
    path, steps = row["path"], np.arange(row["length"])
    table = read_table(path, "index", "episode_index", "frame_index", "next.reward", "next.success")
    with vlmrm.reading(path):
        at = np.flatnonzero(table["episode_index"].to_numpy() == row["episode_index"])
        frames = {"next.reward": 0 * steps, "next.success": steps == steps[-1]} | {
            name: np.ravel(table[name].take(at).to_pylist()) for name in table.column_names}
        if frames["frame_index"].tolist() != steps.tolist():
            raise ValueError(f"episode {row['episode_index']} is not whole")
        return int(at[0]), frames, bool(np.any(frames["next.success"]))

def list_episodes(folder: Path, camera: str | None, limit: int | None = None) -> list[dict]:
    """All about every episode, or the first few, but its pictures. Raises InputError."""
    with vlmrm.reading(path := folder / "meta/info.json"):
        info = vlmrm.read_json(path)
        if (version := info["codebase_version"]) not in ("v2.0", "v2.1", "v3.0"):
            raise ValueError(f"its version is {version}, not v2.0, v2.1 or v3.0")
        kinds = {name: feature["dtype"] for name, feature in info["features"].items()
                 if feature["dtype"] in ("image", "video")}
        chosen = [name for name in kinds if camera in (None, name, name.split(".")[-1])]
        if len(chosen) != 1:
            raise vlmrm.InputError(f"choose a --camera: {folder} has {', '.join(kinds) or 'none'}")
        films = f"videos/{chosen[0]}/"
        if version == "v3.0":
            names = ("episode_index", "length", "tasks", "data/chunk_index", "data/file_index",
                     f"{films}chunk_index", f"{films}file_index", f"{films}from_timestamp")
            rows = [row for file in sorted(path.parent.glob("episodes/*/*.parquet"))
                    for row in read_table(file, *names).to_pylist()]
        else:
            rows = [*map(json.loads, path.with_name("episodes.jsonl").read_bytes().splitlines())]
        if not 0 < len(rows) == info["total_episodes"]:
            raise ValueError(f"it has {info['total_episodes']} episodes, its folder {len(rows)}")
        for row in tqdm(rows := rows[:limit], "listing", leave=False):
            row["sentence"], number = " ".join(" ".join(row["tasks"]).split()), row["episode_index"]
            if len(row["tasks"]) != 1 or not row["sentence"]:
                raise ValueError(f"episode {number} has not one sentence but {row['tasks']}")
            row |= {"camera": chosen[0], "episode_chunk": number // info.get("chunks_size", 1000)}
            table, film = ({name.removeprefix(kind): value for name, value in row.items()}
                           for kind in ("data/", films))  # a path's file_index is data/file_index
            row["path"] = folder / info["data_path"].format(**table)
            row["begin"], row["frames"], row["expert"] = read_frames(row)
            if kinds[chosen[0]] == "video":
                row["path"] = folder / info["video_path"].format(video_key=chosen[0], **film)
                row["begin"] = round(film.get("from_timestamp", 0) * info["fps"])
        return rows

def look(episodes: list[dict], size: int, count: int | None = None):
    """Yield each episode, steps of it (all, or a count, evenly), pictures there: (T, S, S, 3)."""
    opened, place = None, 0
    for episode in tqdm(episodes, "looking"):
        begin, last, seen = episode["begin"], episode["length"] - 1, {}
        steps = np.linspace(0, last, count or last + 1).round().astype(int)
        with vlmrm.reading(path := episode["path"]):
            if opened != path or place >= begin:  # else we go on where we are in it
                opened, pictures = path, enumerate(
                    map(Image.fromarray, imageio.imiter(path)) if path.suffix != ".parquet" else
                    (Image.open(io.BytesIO(cell["bytes"].as_py()))  # unpacked if it is wanted
                     for cell in read_table(path, episode["camera"])[episode["camera"]]))
            for place, picture in pictures:
                if place - begin in steps:
                    seen[place - begin] = np.asarray(picture.convert("RGB").resize((size, size)))
                if place - begin == last:
                    break
            else:
                raise ValueError(f"it ends before episode {episode['episode_index']} does")
        yield episode, steps, np.stack([seen[step] for step in steps])

def read(args: argparse.Namespace) -> None:
    """Write a data set and its sentences, as vlmrm.py takes them."""
    vlmrm.parse_arguments(["--collect", f"--frames={args.frames}", f"--size={args.size}"])  # checks
    for path in (args.out, args.sentences):
        path.touch(exist_ok=False)  # it exists, or one cannot write there: say so before the work
        path.unlink()
    episodes, tasks, sentences = list_episodes(args.folder, args.camera, args.episodes), {}, {}
    for episode, steps, frames in look(episodes, args.size, args.frames):
        task = re.sub(r"\W+", "-", (sentence := episode["sentence"]).lower()).strip("-")
        sentences[task] = {"instruction": sentence, "paraphrases": [sentence] * 3}
        since = np.minimum(np.r_[0, steps[:-1] + 1], steps)  # has any step since then succeeded?
        tasks.setdefault(task, []).append({
            "task": task, "source": "expert" if episode["expert"] else "mixed", "steps": steps,
            "seed": episode["episode_index"], "strip": vlmrm.encode_frames(frames),
            "rewards": np.float32(episode["frames"]["next.reward"])[steps],
            "success": np.logical_or.reduceat(episode["frames"]["next.success"], since)})
    vlmrm.write_dataset(args.out, [e for some in tasks.values() for e in vlmrm.assign_splits(some)])
    vlmrm.write_whole(args.sentences, sentences)
    print(f"wrote {len(episodes)} episodes; {args.sentences} repeats each sentence as paraphrases")

def progress(args: argparse.Namespace) -> None:
    """Write the reward of every frame as progress: under a sentence the mean of its experts' first
    frames is 0, of their last 1. Not in an episode: there the best of a failure would be 1 too."""
    vlmrm.check_cosine(args.run)
    model, episodes = vlmrm.load_reward_model(args.run), list_episodes(args.folder, args.camera)
    ends = {e["sentence"]: [] for e in episodes if e["expert"]}
    if lost := {e["sentence"] for e in episodes} - set(ends):
        raise vlmrm.InputError(f"{min(lost)!r} has no expert: nobody shows what 0 and 1 are")
    model.check_sentences(list(ends))
    for e, _, frames in look(episodes, args.size):
        e["rewards"] = model.score(frames, e["sentence"])
        ends[e["sentence"]] += [e["rewards"][[0, -1]]] * e["expert"]
    for e in episodes:
        zero, one = np.mean(ends[e["sentence"]], axis=0)
        if zero >= one:
            raise vlmrm.InputError(f"the reward of {e['sentence']!r} does not rise in its experts")
        e["frames"]["progress_sparse"] = np.float32((e["rewards"] - zero) / (one - zero)).clip(0, 1)
    import pyarrow.parquet
    pyarrow.parquet.write_table(pyarrow.table({
        name: np.concatenate([e["frames"][name] for e in episodes]) for name in (
            "index", "episode_index", "frame_index", "progress_sparse")}), whole := io.BytesIO())
    vlmrm.write_whole(args.folder / "sarm_progress.parquet", whole.getvalue())

def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("lerobot_data", description="LeRobot's data in, progress out.")
    modes = parser.add_subparsers(dest="mode", required=True)
    add = (reading := modes.add_parser("read", help="make a data set")).add_argument
    add("--out", type=Path, required=True, help="the data set to write, an npz file")
    add("--sentences", type=Path, required=True, help="its sentences, a JSON file")
    add("--frames", type=int, default=24, help="of each episode (24)")
    add("--episodes", type=int, help="only so many, the first (all)")
    writing = modes.add_parser("progress", help="score every frame")
    writing.add_argument("run", type=Path, help="a trained model, such as runs/triplet-seed0")
    for mode in (reading, writing):
        mode.add_argument("folder", type=Path, help="a LeRobotDataset")
        mode.add_argument("--camera", help="which, if it has several")
        mode.add_argument("--size", type=int, default=96, help="of pictures, square (96)")
    args = parser.parse_args(argv)
    try:
        {"read": read, "progress": progress}[args.mode](args)
    except (vlmrm.InputError, OSError) as problem:
        print("lerobot_data:", " ".join(str(problem).split()), file=sys.stderr)
        sys.exit(2)

if __name__ == "__main__":
    main()
