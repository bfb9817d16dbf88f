"""What trial.py and guide.py share: their folder of results, and jobs side by side in processes."""
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import common  # finds vlmrm

import torch
from tqdm import tqdm

import vlmrm

RESULTS = vlmrm.DATA / "results"

def from_file(name: str, part: str = "loss"):
    """The loss, or the reward, of a file of data/objectives/."""
    return vlmrm.get_objective(str(vlmrm.DATA / "objectives" / f"{name}.py"))[part]

def side_by_side(play, jobs: dict[str, dict], count: int, total: int, title: str):
    """Yield (name, play(job)) of each job as it is done, in count processes. total: with the jobs
    that were done before, for the bar. After an error no other job begins."""
    os.environ["TQDM_DISABLE"] = "1"  # the bars of the workers
    bar = tqdm(desc=title, total=total, initial=total - len(jobs), disable=False)
    # A thread each: two runs side by side are faster than one with two threads.
    with bar, ProcessPoolExecutor(
            count, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        futures = {pool.submit(play, job): name for name, job in jobs.items()}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
                bar.set_postfix_str(futures[future], refresh=False)
                bar.update()
        finally:
            pool.shutdown(cancel_futures=True)

def keep(found: dict, path: Path) -> dict:
    """Write results, with those that another process has written meanwhile; return both."""
    if path.exists():
        theirs = vlmrm.read_json(path)
        found = {part: {**theirs[part], **found[part]} for part in found}
    vlmrm.write_whole(path, vlmrm.to_json(found))
    return found

def add_options(options: common.Parser) -> None:
    """The options that both have."""
    add = options.add_argument
    add("--results", type=Path, default=RESULTS, help="a folder (data/results)")
    add("--device", default="auto", help="auto, cuda, mps or cpu")
    add("--workers", type=int, default=os.cpu_count(), help="processes (one a core)")
