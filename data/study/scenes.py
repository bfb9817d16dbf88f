"""Pictures of random scenes with captions, and a tiny CLIP trained on them. It stays beside
vlmrm.py because it makes data/tiny.safetensors: a backbone that has seen drawers, doors and mugs in
all their states before any objective touches it, as SigLIP2 has seen the web. No expert, policy,
reward or instruction of a task has any part in it.

    python data/scenes.py collect --out runs/scenes/train              200,000 scenes: 25 minutes
    python data/scenes.py collect --out runs/scenes/test --seed 1 --scenes 80
    python data/scenes.py train --scenes runs/scenes/train --test runs/scenes/test     45 minutes

The times are of two cores. --strict leaves out the environments of the ten unseen tasks, and writes
data/strict.safetensors. The same command goes on with what was stopped. What stands where, and all
words, are in scenes.json. A file of scenes holds pictures and measures of the state, no captions:
what is said of a scene is drawn again, in other words, each time it is shown.
"""
import argparse
import io
import itertools
import math
import multiprocessing
import os
import re
import signal
import sys
import zlib
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("MUJOCO_GL", "osmesa")
import vlmrm  # before torch and mujoco
import numpy as np
import torch
from PIL import Image
from safetensors.torch import save
from tqdm import tqdm

TABLES = vlmrm.read_json(Path(__file__).with_suffix(".json"))
RATE = 1e-3  # of learning, at its peak

def expand(content):
    """The tables with every $NAME replaced by the words it stands for."""
    if isinstance(content, str):
        return re.sub(r"\$(\w+)", lambda name: expand(TABLES["words"][name[1]]), content)
    if isinstance(content, dict):
        return {key: expand(value) for key, value in content.items()}
    return [expand(value) for value in content] if isinstance(content, list) else content

EMPTY = {"joints": [], "objects": [], "targets": [], "told": [], "parts": [], "flags": []}
KINDS = [EMPTY | {"lifted": True} | kind for kind in expand(TABLES["kinds"])]
KIND_OF = {f"{task}-v3": kind for kind in KINDS for task in kind["tasks"].split()}

# -----------------------------------------------------------------------------
# From the state of a scene to words. A fact is an interval of one of a kind's measures and the
# phrases that are true in it; facts in the same words are the same fact, whatever their kind.

FRACTIONS, NEAR, LIFTS, SPREADS, HEIGHTS = (
    TABLES[name] for name in ("fractions", "near", "lifts", "spreads", "heights"))
HAND, MARKER, TOUCH, CLEAR, ABOVE, HELD, HOLD = (
    TABLES["words"][name] for name in "HAND MARKER TOUCH CLEAR ABOVE HELD HOLD".split())
MARKS = "*^~"  # of the words: see scenes.json
VERBS = re.compile(" (is|has|was) ")

def marked(adverbs: str, words: str) -> list[str]:
    """Every adverb before every word, the word's marks kept where they still hold."""
    phrases = []
    for adverb, word in itertools.product(adverbs.split("|"), words.split("|")):
        mark, text = re.fullmatch(r"([*^~]*)(.*)", word).groups()
        if adverb and "~" in mark:
            continue
        mark = mark.replace("^", "") if adverb == "not" else mark
        phrases.append((mark.replace("*", "") if " " in adverb or adverb == "not" else mark)
                       + f"{adverb} {text}".strip())
    return phrases

def distances(radius: float, touching: str, off: str, weight: float, fade: float = 1.0):
    """The steps of a distance to a target, and the phrases that are true there: from, to, phrases,
    weight, which fades with the distance: far things are less worth a mention."""
    yield -9, radius, touching.split("|"), weight
    for low, high, phrases in NEAR:
        yield radius + low, radius + high, [
            phrase.replace("{at}", text.lstrip(MARKS)) for phrase in phrases.split("|")
            for text in (touching.split("|") if "{at}" in phrase else "-")
            if "~" not in text], (weight := weight * fade)
    yield radius + 0.03, 9, off.split("|"), weight / 2
    yield radius + 0.06, 9, marked("not", touching), weight / 5

def measures_and_facts(kind: dict) -> tuple[list, list]:
    """A kind's measures, [(what, which)], and facts, [(measure, from, to, nouns, phrases, other
    nouns, weight)]. The weight is how readily a caption begins with the fact."""
    measures, facts = [], []

    def add(nouns, low, high, phrases, weight=1.0, other=""):
        phrases = phrases.split("|") if isinstance(phrases, str) else phrases
        facts.append((len(measures) - 1, low, high, nouns, tuple(phrases), other, weight))

    for name, steps in (("spread", SPREADS), ("height", HEIGHTS)):
        measures.append((name, 0))
        for step in steps:
            add(HAND, *step, 0.2)
    for i, (_, _, _, nouns, low, high) in enumerate(kind["joints"]):
        measures.append(("joint", i))
        for start, end, *adverbs, weight in FRACTIONS:
            add(nouns, start, end, [
                phrase for some, words in zip(adverbs, (low, high)) if some is not None
                for phrase in marked(some, words)], weight)
        for start, end, before, now in ((0.65, 9, low, high), (-9, 0.3, high, low)):
            add("|".join(f"{once}{word.lstrip(MARKS)} {noun}" for once in ("", "once ", "formerly ")
                         for word in before.split("|") if "*" in word
                         for noun in nouns.split("|")), start, end, now, 0.7)  # a closed door open
    for i, (nouns, _, _, rest, _) in enumerate(kind["objects"]):
        if rest is not None:
            measures.append(("held", i))
            add(nouns, 0.5, 9, HELD)
            add(HAND, 0.5, 9, HOLD, other=nouns)
            measures.append(("lift", i))
            for step in LIFTS * kind["lifted"]:
                add(nouns, *step)
    for i, (thing, other, _, radius, _, touching, off) in enumerate(kind["targets"]):
        measures.append(("target", i))
        for step in distances(radius, touching, off, 3):
            add(kind["objects"][thing][0], *step, other)
        for _, nouns, high, low in (told for told in kind["told"] if told[0] == i):
            add(nouns, -9, radius + 0.01, high.split("|") + marked("not", low), 0.7)
            add(nouns, radius + 0.06, 9, low.split("|") + marked("not", high), 0.7)
    for i, nouns in enumerate(nouns for nouns, *_ in kind["parts"] + kind["objects"]):
        weight = 4 if nouns.startswith(MARKER) else 1
        measures.append(("part", i))
        for step in distances(0.06, TOUCH, CLEAR, weight, fade=0.5):
            add(HAND, *step, nouns)
        measures.append(("above", i))
        add(HAND, 0.5, 9, ABOVE, weight, nouns)
    for i, (nouns, _, _, _, low, high) in enumerate(kind["flags"]):
        measures.append(("flag", i))
        add(nouns, -9, 0, low)
        add(nouns, 0, 9, high)
    return measures, facts

def clause(rng, nouns: str, phrases: tuple, other: str, names: dict) -> str:
    """One fact in words: "the drawer is half open", "a half open drawer", "the hand near it". The
    names that things have got in this caption are kept in names."""
    def pick(options):
        return options[int(rng.integers(len(options)))]

    mark, text = re.fullmatch(r"([*^~]*)(.*)", pick(phrases)).groups()
    noun, thing = (names.setdefault(some, pick(some.split("|"))) for some in (nouns, other))
    frames = ["the {n} {p}"] * 3 + ["a {n} {p}"]
    if "~" not in mark:
        frames += ["the {n} is {p}"] * 4 + ["a {n} that is {p}", "the {n} is now {p}"]
    if "*" in mark:
        frames += ["a {p} {n}"] * 2 + ["the {p} {n}", "there is a {p} {n}"]
    if "^" in mark:
        frames += ["the {n} has been {p}"] * 2 + ["the {n} was {p}"]
    return pick(frames).format(n=noun, p=text.replace("{t}", f"the {thing}"))

def caption(rng, facts: list, true: np.ndarray, tokenizer) -> tuple[str, list[int]]:
    """A caption of a scene, and which of its kind's facts it states: one to three of the true ones,
    no two of the same measure, in at most 22 word pieces. true (F,): which facts hold."""
    while True:
        left, said, count = np.flatnonzero(true), [], rng.choice([1, 2, 3], p=[0.35, 0.45, 0.2])
        while len(left) and len(said) < count:
            weights = np.array([facts[k][-1] ** (0.5 if said else 1.5) for k in left])
            said.append(int(rng.choice(left, p=weights / weights.sum())))
            left = [k for k in left if facts[k][0] != facts[said[-1]][0]]
        text, names = "", {}
        for k in rng.permutation(said):
            words = clause(rng, *facts[k][3:6], names)
            links = [", ", " and ", " while "] + [", with "] * (not VERBS.search(words))
            text += (links[int(rng.integers(len(links)))] if text else "") + words
        text = re.sub(r"\ba (?=[aeiou])", "an ", text)
        if len(tokenizer.encode(text)) <= 22:
            return text, said

# -----------------------------------------------------------------------------
# Collection

def locate(env, place: list | str) -> np.ndarray:
    """Where a place is, (3,): "hand", "target", or a body, site or geom; plus an offset."""
    name, *offset = place if isinstance(place, list) else [place]
    offset = np.array([*offset, 0, 0, 0][:3])
    if name in ("hand", "target"):
        return (env.tcp_center if name == "hand" else env._target_pos) + offset
    for access in (env.data.body, env.data.site, env.data.geom):
        try:
            return access(name).xpos + offset
        except KeyError:
            pass
    raise vlmrm.InputError(f"scenes.json: there is no {name} in {type(env).__name__}")

def joint_address(env, name: str) -> int:
    """Where a joint, or the only joint of a body, begins in qpos."""
    try:
        return int(env.model.jnt_qposadr[env.model.joint(name).id])
    except KeyError:
        return int(env.model.jnt_qposadr[env.model.body(name).jntadr[0]])

def forward(env) -> None:
    """Bring places, contacts and pictures up to date with qpos."""
    import mujoco  # vlmrm.open_task() has chosen how to draw; training does without
    mujoco.mj_forward(env.model, env.data)

def put_object(env, thing: list, position: np.ndarray) -> None:
    """Set an object's free joint, or its two slides, so that the object is at a position."""
    _, body, joint, _, _ = thing
    if isinstance(joint, str):
        env.data.qpos[joint_address(env, joint):][:3] = position
        return
    for axis, name in enumerate(joint):
        to = env.data.qpos[joint_address(env, name)] + position[axis] - locate(env, body)[axis]
        low, high = env.model.joint(name).range
        env.data.qpos[joint_address(env, name)] = np.clip(to, low - 0.06, high + 0.06)

def scatter_object(env, kind: dict, i: int, rng) -> None:
    """Put object i of the kind where it is lifted, or at, near, or on the way to one of its
    targets, or anywhere."""
    _, body, _, rest, _ = thing = kind["objects"][i]
    start = locate(env, body).copy()
    anywhere = np.array([rng.uniform(-0.3, 0.3), rng.uniform(0.45, 0.85), rest or 0])
    targets = [target for target in kind["targets"] if target[0] == i]
    if not targets:
        return put_object(env, thing, start if rng.random() < 0.5 else anywhere)
    place, out = targets[rng.integers(len(targets))][2:5:2]
    goal, mode = locate(env, place), rng.choice(6, p=[0.12, 0.2, 0.13, 0.25, 0.15, 0.15])
    position = [start, goal + rng.normal(size=3) * 0.008, goal + rng.uniform(0, 1) * np.array(out),
                start + rng.uniform(0, 1) * (goal - start), goal + rng.normal(size=3) * 0.05,
                anywhere][mode]
    if rest is not None:
        carried = goal[2] > rest + 0.06 or out[2] > 0.05  # other things are pushed, most often
        if mode >= 3 and rng.random() < (0.5 if carried else 0.2):
            position[2] += rng.uniform(0, 0.2)
        position[2] = max(position[2], min(rest, goal[2]) if mode in (1, 2) else rest)
    put_object(env, thing, position)

def scatter(env, kind: dict, rng) -> None:
    """Put the task's furniture, joints and objects into a random state."""
    forward(env)
    env.reset_model()  # furniture and marker; the hand's part of it is taken out
    forward(env)
    for name, low, high, *_ in kind["joints"]:
        u = rng.choice([rng.normal() * 0.02, 1 + rng.normal() * 0.03, rng.uniform()],
                       p=[0.22, 0.22, 0.56])
        env.data.qpos[joint_address(env, name)] = low + u * (high - low)
    forward(env)
    for i in range(len(kind["objects"])):
        scatter_object(env, kind, i, rng)
        forward(env)

def pierced(env, root: int, spared: set) -> bool:
    """Whether a thing (a root body) is more than a centimetre inside another, but the spared."""
    roots = env.model.body_rootid[env.model.geom_bodyid]
    pairs = [{roots[contact.geom1], roots[contact.geom2]} for contact in env.data.contact
             if contact.dist < -0.01]
    return any(root in pair and len(pair) == 2 and not pair & spared for pair in pairs)

def move_hand(env, place: np.ndarray) -> None:
    """Let the arm swing its hand to a place through whatever is in the way."""
    import mujoco
    contacts = int(mujoco.mjtDisableBit.mjDSBL_CONTACT)
    env.model.opt.disableflags |= contacts
    env.data.mocap_pos[0], env.data.mocap_quat[0] = place + (0, 0, 0.045), (1, 0, 1, 0)
    mujoco.mj_step(env.model, env.data, nstep=50)
    env.model.opt.disableflags &= ~contacts

def choose_hand(env, kind: dict, rng) -> tuple[np.ndarray, int | None]:
    """A place for the hand, mostly near something, and the object that it holds there, if any: what
    is in the air is held, most often."""
    for i, (_, body, _, rest, grasp) in enumerate(kind["objects"]):
        if rest is not None:
            place = locate(env, body)
            at_target = any(np.linalg.norm(place - locate(env, target[2])) < 0.05
                            for target in kind["targets"] if target[0] == i)
            floats = place[2] > rest + 0.02 and not at_target
            if rng.random() < (0.85 if floats else 0.35 if kind["targets"] else 0.05):
                return place + grasp, i
    places = hand_places(kind)
    main = not kind["targets"] and rng.random() < 0.6
    at, mode = locate(env, places[0 if main else rng.integers(len(places))]), rng.random()
    if mode < 0.4:
        at = at + rng.normal(size=3) * (0.03, 0.04, 0.03)
    elif mode < 0.6:
        at = at + (0, 0, rng.uniform(0.04, 0.2)) + rng.normal(size=3) * 0.015
    elif mode < 0.75:
        at = at + rng.normal(size=3) * 0.1
    else:
        at = rng.uniform((-0.5, 0.4, 0.01), (0.35, 0.85, 0.35))
    return np.clip(at, (-0.5, 0.36, 0.0), (0.55, 0.93, 0.42)), None

def hand_places(kind: dict) -> list:
    """The places that the hand may be near to: the kind's parts, and where to grasp its objects."""
    return [place for _, place in kind["parts"]] + [
        [body, *grasp] for _, body, _, _, grasp in kind["objects"]]

def make_scene(env, kind: dict, home: np.ndarray, rng) -> np.ndarray:
    """Put simulator and hand into a random state, from the qpos home of the things; its measures,
    in the order of measures_and_facts(). Tries again, 8 times, where things are in each other."""
    model, data = env.model, env.data
    robot = [joint_address(env, f"right_j{i}") for i in range(7)] + [
        joint_address(env, f"{side}_close") for side in "rl"]
    arm, table, *loose = (int(model.body_rootid[model.body(name).id]) for name in [
        "hand", "tablelink", *(thing[1] for thing in kind["objects"] if type(thing[2]) is str)])
    for _ in range(8):
        now = data.qpos[robot].copy()
        data.qpos[:], data.qvel[:] = home, 0
        data.qpos[robot] = now
        scatter(env, kind, rng)
        if any(pierced(env, root, {arm, table}) for root in loose):  # some lie in the table a bit
            continue
        state = data.qpos.copy()
        place, held = choose_hand(env, kind, rng)
        move_hand(env, place)
        state[robot] = data.qpos[robot]
        data.qpos[:], data.qvel[:] = state, 0
        spread = rng.choice([0, 1, rng.uniform()], p=[0.4, 0.4, 0.2])
        data.qpos[robot[-2:]] = ((0.025, -0.025) if held is not None else
                                 (0.04 * (1 - spread), -0.03 * (1 - spread)))
        forward(env)
        if held is not None:
            put_object(env, kind["objects"][held], env.tcp_center - kind["objects"][held][-1])
            forward(env)
        if not pierced(env, arm, set(loose)):
            break
    return measure(env, kind, held, 1 - (data.qpos[robot[-2]] - data.qpos[robot[-1]]) / 0.07)

def measure(env, kind: dict, held: int | None, spread: float) -> np.ndarray:
    """The measures of the simulator's state, in the order of measures_and_facts()."""
    hand, places, values = locate(env, "hand"), hand_places(kind), []
    for what, i in measures_and_facts(kind)[0]:
        if what == "joint":
            name, low, high, *_ = kind["joints"][i]
            value = (env.data.qpos[joint_address(env, name)] - low) / (high - low)
        elif what == "lift":
            value = locate(env, kind["objects"][i][1])[2] - kind["objects"][i][3]
        elif what == "target":
            thing, _, place, *_ = kind["targets"][i]
            gaps = locate(env, kind["objects"][thing][1]) - locate(env, place)
            value = np.linalg.norm(gaps[:2 if kind["objects"][thing][3] is None else 3])
        elif what == "part":
            value = np.linalg.norm(hand - locate(env, places[i]))
        elif what == "above":
            gaps = hand - locate(env, places[i])
            value = gaps[2] > 0.05 and np.linalg.norm(gaps[:2]) < 0.05
        elif what == "flag":
            _, place, axis, limit, *_ = kind["flags"][i]
            value = locate(env, place)[axis] - limit
        else:
            value = {"spread": spread, "height": hand[2], "held": held == i}[what]
        values.append(value)
    return np.float32(values)

def collect_task(job: dict) -> None:
    """Make the scenes of one environment and write them as an .npz file."""
    task, (env, _, renderer) = job["task"], vlmrm.open_task(job["task"], 96)
    rng = np.random.default_rng([job["seed"], zlib.crc32(task.encode())])
    env.seeded_rand_vec, env._freeze_rand_vec = True, False
    env.seed(int(rng.integers(2**31)))
    env.reset()
    env._reset_hand = lambda *_: None  # the slow part of a reset; move_hand() does it
    home, measures, strips = env.data.qpos.copy(), [], []
    for first in range(0, job["scenes"], 24):
        pictures = []
        for _ in range(min(24, job["scenes"] - first)):
            measures.append(make_scene(env, KIND_OF[task], home, rng))
            pictures.append(vlmrm.draw(renderer, env.data, {}))
        strips.append(vlmrm.encode_frames(np.stack(pictures)))
    renderer.close()
    np.savez(file := io.BytesIO(), measures=np.stack(measures),
             offsets=np.cumsum([0, *map(len, strips)]),
             strips=np.frombuffer(b"".join(strips), np.uint8))
    vlmrm.write_whole(job["out"] / f"{task}.npz", file.getvalue())

def collect(args: argparse.Namespace) -> None:
    """Make the scenes of args.tasks in parallel processes, a file of each environment in the folder
    args.out, but for those that are there: the same bytes whatever the number of workers."""
    args.out.mkdir(parents=True, exist_ok=True)
    jobs = [vars(args) | {"task": task} for task in args.tasks
            if not (args.out / f"{task}.npz").exists()]
    with ProcessPoolExecutor(  # as in vlmrm.collect()
            args.workers, multiprocessing.get_context("spawn"),
            signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        list(tqdm(pool.map(collect_task, jobs), "collecting", total=len(jobs)))
    print(f"the scenes of {len(args.tasks)} environments are in {args.out}")

# -----------------------------------------------------------------------------
# Training

def load_scenes(folders: list[Path], tasks: list[str]) -> dict:
    """Scenes of some environments, N in all: "pictures" uint8 (N, 96, 96, 3), "true" bool (N, F),
    which of all facts hold, and of each task its "rows", its kind's "facts", their "numbers"."""
    facts = {task: measures_and_facts(KIND_OF[task])[1] for task in tasks}
    known, files = {}, {}
    numbers = {task: np.array([known.setdefault(fact[3:6], len(known)) for fact in some])
               for task, some in facts.items()}
    for task, folder in itertools.product(tasks, folders):
        with vlmrm.reading(path := folder / f"{task}.npz"):
            files[path] = task, np.load(path, allow_pickle=False)
    count = sum(len(file["measures"]) for _, file in files.values())
    pictures, true = np.empty((count, 96, 96, 3), np.uint8), np.zeros((count, len(known)), bool)
    rows, first = {task: [] for task in tasks}, 0

    def unpack(start: int, strip: bytes) -> None:
        some = np.asarray(Image.open(io.BytesIO(strip)).convert("RGB")).reshape(-1, 96, 96, 3)
        pictures[start:start + len(some)] = some

    for task, file in tqdm(files.values(), "loading"):
        values, strips, ends = file["measures"], file["strips"].tobytes(), file["offsets"]
        with ThreadPoolExecutor() as threads:
            list(threads.map(unpack, itertools.count(first, 24),
                             (strips[a:b] for a, b in itertools.pairwise(ends))))
        for (k, low, high, *_), number in zip(facts[task], numbers[task]):
            true[first:first + len(values), number] |= (low <= values[:, k]) & (values[:, k] < high)
        rows[task] += range(first, first := first + len(values))
    return {"pictures": pictures, "true": true, "facts": facts, "numbers": numbers,
            "rows": {task: np.array(some) for task, some in rows.items()}}

def describe(scenes: dict, task: str, rows, rng, tokenizer) -> tuple[list[str], np.ndarray]:
    """A caption of each of some scenes of an environment, n, and what they say, float (n, F)."""
    facts, numbers, texts = scenes["facts"][task], scenes["numbers"][task], []
    said = np.zeros((len(rows), scenes["true"].shape[1]), np.float32)
    for i, row in enumerate(rows):
        text, which = caption(rng, facts, scenes["true"][row, numbers], tokenizer)
        said[i, numbers[which]] = 1
        texts.append(text)
    return texts, said

def agreement(scenes: dict, rows: np.ndarray, said: np.ndarray) -> np.ndarray:
    """Which caption is true of which scene: bool (n, n), scenes down, captions across. Some of what
    a caption says is false where the count of its true facts falls short."""
    return scenes["true"][rows].astype(np.float32) @ said.T == said.sum(1)

def augment(pictures: np.ndarray, rng, shift: int = 4, light: float = 0.15) -> np.ndarray:
    """Pictures (n, 96, 96, 3) moved by up to 4 pixels either way, brighter or darker by 15 %."""
    size, moves = pictures.shape[1], rng.integers(0, 2 * shift + 1, (len(pictures), 2))
    wide = np.pad(pictures, ((0, 0), (shift, shift), (shift, shift), (0, 0)), "edge")
    gains = np.uint16(128 * (1 + light * rng.uniform(-1, 1, len(pictures))))
    return np.stack([np.minimum(some[y:y + size, x:x + size] * gain >> 7, 255).astype(np.uint8)
                     for some, (y, x), gain in zip(wide, moves, gains)])

def contrast(frames, texts, true, scale) -> torch.Tensor:
    """CLIP's loss with all true captions of a scene, and all scenes of a caption, as positives.
    frames, texts (n, D), unit; true (n, n)."""
    logits, true = scale * frames @ texts.T, true.float()
    return -sum((positive / positive.sum(1, keepdim=True) * score.log_softmax(1)).sum(1).mean()
                for score, positive in ((logits, true), (logits.T, true.T))) / 2

@torch.inference_mode()
def held_out(model, scenes: dict, choices: int = 40) -> tuple[float, float]:
    """How often a scene's own caption comes first of some 40 different ones of its environment, and
    how often any caption does that is true of it."""
    model.eval()
    own, any_true = [], []
    for task, rows in scenes["rows"].items():
        texts, said = describe(scenes, task, rows, np.random.default_rng(0), model.tokenizer)
        kept = np.sort(np.unique(texts, return_index=True)[1])[:choices]
        cosines = (model.embed_frames(scenes["pictures"][rows[kept]])
                   @ model.embed_texts([texts[k] for k in kept]).T)
        first = cosines.argmax(1).cpu().numpy()
        own.extend(first == np.arange(len(kept)))
        any_true.extend(agreement(scenes, rows[kept], said[kept])[np.arange(len(kept)), first])
    return np.mean(own), np.mean(any_true)

def draw_batch(scenes: dict, step: int, args, tokenizer):
    """A batch of 256: 16 scenes of 16 environments each at first, later 32 of 8, so that most of
    what a caption has to be told from is the same environment in another state. Depends on seed
    and step alone. Returns pictures, captions and agreement()."""
    rng = np.random.default_rng([args.seed, step])
    count = min(16 if step <= args.steps // 5 else 8, len(args.tasks))
    rows, texts, said = [], [], []
    for task in rng.choice(args.tasks, size=count, replace=False):
        rows.append(rng.choice(scenes["rows"][task], size=256 // count, replace=False))
        some, facts = describe(scenes, task, rows[-1], rng, tokenizer)
        texts += some
        said.append(facts)
    rows, said = np.concatenate(rows), np.concatenate(said)
    return augment(scenes["pictures"][rows], rng), texts, agreement(scenes, rows, said)

def train(args: argparse.Namespace) -> None:
    """Train tiny from random weights, printing held_out(), and write them to args.out. A checkpoint
    beside it is gone on from. Same seed, CPU and number of threads: the same bytes."""
    model, log = vlmrm.prepare_model(
        {"backbone": "tiny", "pretrained": "none", "lora": 0, "seed": args.seed}), []
    config = {name: str(getattr(args, name)) for name in ("scenes", "steps", "seed", "tasks")}
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05, fused=True)
    if (checkpoint := Path(f"{args.out}.checkpoint")).exists():
        log = vlmrm.load_checkpoint(checkpoint, model, optimizer, config)
    scenes, test = load_scenes(args.scenes, args.tasks), load_scenes([args.test], args.tasks)
    bar = tqdm(range(len(log) + 1, args.steps + 1), "training", initial=len(log), total=args.steps)
    thread = ThreadPoolExecutor(1)  # draws the next batch meanwhile
    ahead = thread.submit(draw_batch, scenes, len(log) + 1, args, model.tokenizer)
    for step in bar:
        pictures, texts, true = ahead.result()
        ahead = thread.submit(draw_batch, scenes, step + 1, args, model.tokenizer)
        model.train()
        frames = model.embed_frames(pictures)
        loss = contrast(frames, model.embed_texts(texts), torch.tensor(true, device=frames.device),
                        model.clip.logit_scale.exp().clamp(max=100))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = RATE * min(
            step / (args.steps // 20 + 1), 0.5 + 0.5 * math.cos(math.pi * (step - 1) / args.steps))
        optimizer.step()
        log.append(loss.item())
        bar.set_postfix(loss=f"{log[-1]:.3f}", refresh=False)
        if step % 200 == 0 or step == args.steps:
            own, any_true = held_out(model, test)
            print(f"step {step}: loss {np.mean(log[-200:]):.3f}, own caption first {own:.3f}, a "
                  f"true one {any_true:.3f}", flush=True)
            vlmrm.save_checkpoint(checkpoint, model, optimizer, log, config)
    vlmrm.write_whole(args.out, save(vlmrm.trained_weights(model)))
    checkpoint.unlink(missing_ok=True)

def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The options. Bad ones end in one line and exit code 2."""
    parser = argparse.ArgumentParser("scenes", description="Make scenes, and a CLIP from them.")
    modes = parser.add_subparsers(dest="mode", required=True)
    add = (collecting := modes.add_parser("collect", help="make pictures")).add_argument
    add("--out", type=Path, required=True, help="a folder, with a file of each environment")
    add("--scenes", type=int, default=4000, help="of each environment (4000)")
    add("--seed", type=int, default=0, help="of all that is random (0)")
    add("--workers", type=int, default=os.cpu_count(), help="processes (one a core)")
    add = (training := modes.add_parser("train", help="train on them")).add_argument
    add("--scenes", type=Path, nargs="+", required=True, help="folders of scenes")
    add("--test", type=Path, required=True, help="a folder of scenes of another seed")
    add("--out", type=Path, help="where weights go (data/tiny.safetensors)")
    add("--steps", type=int, default=5000, help="optimiser steps (5000)")
    add("--seed", type=int, default=0, help="of all that is random (0)")
    for some in (collecting, training):
        some.add_argument("--tasks", nargs="+", choices=KIND_OF, default=sorted(KIND_OF),
                          metavar="TASK", help="environments (all 50)")
        some.add_argument("--strict", action="store_true", help="without the ten unseen tasks'")
    args = parser.parse_args(argv)
    args.tasks = [task for task in args.tasks
                  if not args.strict or vlmrm.group_of(task) == "seen"]
    args.out = args.out or vlmrm.DATA / f"{'strict' if args.strict else 'tiny'}.safetensors"
    return args

def main() -> None:
    """Obey the command line."""
    args = parse_arguments()
    try:
        {"collect": collect, "train": train}[args.mode](args)
    except (vlmrm.InputError, OSError, KeyboardInterrupt) as problem:
        print("\nscenes:", str(problem) or "stopped; the same command goes on", file=sys.stderr)
        sys.exit(2)

if __name__ == "__main__":
    main()
