"""Pictures of random scenes with captions, and a tiny CLIP trained on them: data/tiny.safetensors,
a backbone that has seen drawers, doors and mugs in all their states before any objective touches
it, as SigLIP2 has seen the web. No expert, policy, reward or instruction has any part in it.

    python data/study/scenes.py collect             200,000 scenes into runs/scenes: 25 minutes
    python data/study/scenes.py train --fold 0      runs/starts/fold0.safetensors: 45 minutes

The times are of two cores with bfloat16. Both commands go on with what was stopped. A fold is what
left_out() says: the start of a fold has seen no picture and no caption of its ten environments.
Without --fold it sees all fifty (runs/starts/all.safetensors). What stands where, and all words,
are in scenes.json. A file of scenes has pictures and measures of the state, no captions: what is
said of a scene is drawn again, in other words, each time it is shown.
"""
import functools
import io
import itertools
import math
import multiprocessing
import os
import re
import signal
import sys
import zlib
from collections import namedtuple
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import common  # finds vlmrm

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save
from tqdm import tqdm

import vlmrm

TABLES = vlmrm.read_json(Path(__file__).with_suffix(".json"))
RATE = 1e-3  # of learning, at its peak

def expand(content):
    """A part of the tables with every $NAME replaced by the words it stands for."""
    if isinstance(content, str):
        return re.sub(r"\$(\w+)", lambda name: expand(TABLES["words"][name[1]]), content)
    if isinstance(content, list):
        return [expand(value) for value in content]
    if isinstance(content, dict):
        return {key: expand(value) for key, value in content.items()}
    return content

FIRST_FOLD = vlmrm.UNSEEN_TASKS

def left_out(fold: int) -> tuple[str, ...]:
    """The ten tasks that are unseen in a fold, 0 to 4. Fold 0 is the split of vlmrm.py. The other
    forty tasks are dealt out in alphabetical order, so that tasks alike (door-close, door-lock)
    come into different folds."""
    if fold == 0:
        return FIRST_FOLD
    others = [task for task in sorted(KIND_OF) if task not in FIRST_FOLD]
    return tuple(others[fold - 1::4])

# What an environment has in it: the rows of scenes.json, which says what each word means.
ROWS = {"joints": namedtuple("Joint", "name low high nouns low_words high_words"),
        "objects": namedtuple("Thing", "nouns body joint rest grasp"),
        "targets": namedtuple("Target", "thing nouns place radius out touching off"),
        "told": namedtuple("Told", "target nouns touching off"),
        "parts": namedtuple("Part", "nouns place"),
        "flags": namedtuple("Flag", "nouns place axis limit below above")}
KIND_OF = {}  # {task: {"joints": [Joint], ...}}
for table in expand(TABLES["kinds"]):
    kind = {name: [row(*values) for values in table.get(name, [])] for name, row in ROWS.items()}
    kind["lifted"] = table.get("lifted", True)
    for task in table["tasks"].split():
        KIND_OF[f"{task}-v3"] = kind

# 1. From the state of a scene to words ------------------------------------------------------------
# A measure is a number of the state: how far a joint is open, say. A fact is an interval of one
# measure and the phrases that are true in it: (low, high, nouns, phrases, other nouns, weight). The
# weight is how readily a caption begins with it. Facts in the same words are the same fact,
# whatever their kind. Alternatives stand between bars.

HAND = TABLES["words"]["HAND"]
MARKS = "*^~"  # of the words: see scenes.json
VERBS = re.compile(" (is|has|was) ")

def split_marks(phrase: str) -> tuple[str, str]:
    """The marks before a phrase, and the phrase."""
    return re.fullmatch(r"([*^~]*)(.*)", phrase).groups()

def marked(adverbs: str, words: str) -> list[str]:
    """Every adverb before every word, the word's marks kept where they still hold."""
    phrases = []
    for adverb, word in itertools.product(adverbs.split("|"), words.split("|")):
        marks, text = split_marks(word)
        if adverb and "~" in marks:
            continue
        if adverb == "not":
            marks = marks.replace("^", "")
        if adverb == "not" or " " in adverb:
            marks = marks.replace("*", "")
        phrases.append(marks + f"{adverb} {text}".strip())
    return phrases

def distance_facts(nouns, radius, touching, off, weight, fade=1.0, other="") -> list[tuple]:
    """Facts of a distance to a target, whose weight fades: far things are less worth a mention."""
    facts = [(-9, radius, nouns, touching.split("|"), other, weight)]
    for low, high, words in TABLES["near"]:
        weight *= fade
        phrases = []
        for phrase in words.split("|"):
            if "{at}" not in phrase:
                phrases.append(phrase)
                continue
            for text in touching.split("|"):
                if "~" not in text:
                    phrases.append(phrase.replace("{at}", text.lstrip(MARKS)))
        facts.append((radius + low, radius + high, nouns, phrases, other, weight))
    facts.append((radius + 0.03, 9, nouns, off.split("|"), other, weight / 2))
    facts.append((radius + 0.06, 9, nouns, marked("not", touching), other, weight / 5))
    return facts

def joint_facts(nouns: str, low: str, high: str) -> list[tuple]:
    """Facts of a joint from its value at the words `low`, 0, to that at `high`, 1."""
    facts = []
    for start, end, low_adverbs, high_adverbs, weight in TABLES["fractions"]:
        phrases = []
        if low_adverbs is not None:
            phrases += marked(low_adverbs, low)
        if high_adverbs is not None:
            phrases += marked(high_adverbs, high)
        facts.append((start, end, nouns, phrases, "", weight))
    for start, end, before, now in ((0.65, 9, low, high), (-9, 0.3, high, low)):
        adjectives = [word.lstrip(MARKS) for word in before.split("|") if "*" in word]
        names = []  # a closed door is open now
        for once, word in itertools.product(("", "once ", "formerly "), adjectives):
            for noun in nouns.split("|"):
                names.append(f"{once}{word} {noun}")
        facts.append((start, end, "|".join(names), now.split("|"), "", 0.7))
    return facts

def target_facts(kind: dict, i: int) -> list[tuple]:
    """Facts of the distance of an object to target i, and what that tells of other things."""
    target = kind["targets"][i]
    nouns = kind["objects"][target.thing].nouns
    facts = distance_facts(
        nouns, target.radius, target.touching, target.off, 3, other=target.nouns)
    for told in kind["told"]:
        if told.target == i:
            near = told.touching.split("|") + marked("not", told.off)
            far = told.off.split("|") + marked("not", told.touching)
            facts.append((-9, target.radius + 0.01, told.nouns, near, "", 0.7))
            facts.append((target.radius + 0.06, 9, told.nouns, far, "", 0.7))
    return facts

@functools.cache
def facts_of(task: str) -> dict[tuple, list[tuple]]:
    """{measure (what, which): facts} of a task's environment."""
    kind = KIND_OF[task]
    words = {name: TABLES["words"][name] for name in ("TOUCH", "CLEAR", "ABOVE", "HELD", "HOLD")}
    held, hold, above = (words[name].split("|") for name in ("HELD", "HOLD", "ABOVE"))
    facts = {}
    for what, table in (("spread", "spreads"), ("height", "heights")):
        facts[what, 0] = [(low, high, HAND, phrases.split("|"), "", 0.2)
                          for low, high, phrases in TABLES[table]]
    for i, joint in enumerate(kind["joints"]):
        facts["joint", i] = joint_facts(joint.nouns, joint.low_words, joint.high_words)
    for i, thing in enumerate(kind["objects"]):
        if thing.rest is None:
            continue
        nouns = thing.nouns
        facts["held", i] = [(0.5, 9, nouns, held, "", 1), (0.5, 9, HAND, hold, nouns, 1)]
        facts["lift", i] = []
        if kind["lifted"]:
            for low, high, phrases in TABLES["lifts"]:
                facts["lift", i].append((low, high, nouns, phrases.split("|"), "", 1))
    for i in range(len(kind["targets"])):
        facts["target", i] = target_facts(kind, i)
    for i, thing in enumerate(kind["parts"] + kind["objects"]):
        nouns = thing.nouns
        weight = 4 if nouns.startswith(TABLES["words"]["MARKER"]) else 1
        facts["part", i] = distance_facts(
            HAND, 0.06, words["TOUCH"], words["CLEAR"], weight, fade=0.5, other=nouns)
        facts["above", i] = [(0.5, 9, HAND, above, nouns, weight)]
    for i, flag in enumerate(kind["flags"]):
        facts["flag", i] = [(-9, 0, flag.nouns, flag.below.split("|"), "", 1),
                            (0, 9, flag.nouns, flag.above.split("|"), "", 1)]
    return facts

def numbered_facts(task: str) -> list[tuple]:
    """All facts of a task's environment, with their measure's number first."""
    numbered = []
    for number, facts in enumerate(facts_of(task).values()):
        for low, high, nouns, phrases, other, weight in facts:
            numbered.append((number, low, high, nouns, tuple(phrases), other, weight))
    return numbered

def pick(rng, options: list):
    """One of some options."""
    return options[int(rng.integers(len(options)))]

def clause(rng, fact: tuple, names: dict) -> str:
    """One fact in words: "the drawer is half open", "a half open drawer", "the hand near it". The
    names that things have got in this caption are kept in names."""
    _, _, _, nouns, phrases, other, _ = fact
    marks, text = split_marks(pick(rng, phrases))
    noun = names.setdefault(nouns, pick(rng, nouns.split("|")))
    thing = names.setdefault(other, pick(rng, other.split("|")))
    frames = ["the {n} {p}"] * 3 + ["a {n} {p}"]
    if "~" not in marks:
        frames += ["the {n} is {p}"] * 4 + ["a {n} that is {p}", "the {n} is now {p}"]
    if "*" in marks:
        frames += ["a {p} {n}"] * 2 + ["the {p} {n}", "there is a {p} {n}"]
    if "^" in marks:
        frames += ["the {n} has been {p}"] * 2 + ["the {n} was {p}"]
    return pick(rng, frames).format(n=noun, p=text.replace("{t}", f"the {thing}"))

def caption(rng, facts: list, true: np.ndarray, tokenizer) -> tuple[str, list[int]]:
    """A caption of a scene, and which of the facts it states: one to three of the true ones, no two
    of the same measure, in at most 22 word pieces. true (F,): which facts hold."""
    while True:
        left = np.flatnonzero(true)
        said = []
        count = rng.choice([1, 2, 3], p=[0.35, 0.45, 0.2])
        while len(left) and len(said) < count:
            power = 0.5 if said else 1.5
            weights = np.array([facts[k][-1] ** power for k in left])
            said.append(int(rng.choice(left, p=weights / weights.sum())))
            left = [k for k in left if facts[k][0] != facts[said[-1]][0]]
        text = ""
        names = {}
        for k in rng.permutation(said):
            words = clause(rng, facts[k], names)
            links = [", ", " and ", " while "]
            if not VERBS.search(words):
                links.append(", with ")
            text += (pick(rng, links) if text else "") + words
        text = re.sub(r"\ba (?=[aeiou])", "an ", text)
        if len(tokenizer.encode(text)) <= 22:
            return text, said

# 2. Collection ------------------------------------------------------------------------------------

def locate(env, place: list | str) -> np.ndarray:
    """Where a place is, (3,): "hand", "target", or a body, site or geom; plus an offset."""
    name, *offset = [place] if isinstance(place, str) else place
    offset = np.array([*offset, 0, 0, 0][:3])
    if name == "hand":
        return env.tcp_center + offset
    if name == "target":
        return env._target_pos + offset
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

def put_object(env, thing, position: np.ndarray) -> None:
    """Set an object's free joint, or its two slides, so that the object is at a position."""
    if isinstance(thing.joint, str):
        env.data.qpos[joint_address(env, thing.joint):][:3] = position
        return
    for axis, name in enumerate(thing.joint):
        address = joint_address(env, name)
        to = env.data.qpos[address] + position[axis] - locate(env, thing.body)[axis]
        low, high = env.model.joint(name).range
        env.data.qpos[address] = np.clip(to, low - 0.06, high + 0.06)

def scatter_object(env, kind: dict, i: int, rng) -> None:
    """Put object i of the kind where it is lifted, or at, near, or on the way to one of its
    targets, or anywhere."""
    thing = kind["objects"][i]
    rest = thing.rest
    start = locate(env, thing.body).copy()
    anywhere = np.array([rng.uniform(-0.3, 0.3), rng.uniform(0.45, 0.85), rest or 0])
    targets = [target for target in kind["targets"] if target.thing == i]
    if not targets:
        put_object(env, thing, start if rng.random() < 0.5 else anywhere)
        return
    target = targets[rng.integers(len(targets))]
    goal = locate(env, target.place)
    modes = ["start", "there", "leaving", "coming", "near", "anywhere"]
    mode = modes[rng.choice(6, p=[0.12, 0.2, 0.13, 0.25, 0.15, 0.15])]
    places = {"start": start, "there": goal + rng.normal(size=3) * 0.008}
    places["leaving"] = goal + rng.uniform(0, 1) * np.array(target.out)
    places["coming"] = start + rng.uniform(0, 1) * (goal - start)
    places["near"] = goal + rng.normal(size=3) * 0.05
    places["anywhere"] = anywhere
    position = places[mode]
    if rest is not None:
        lowest = rest
        if mode in ("there", "leaving"):
            lowest = min(rest, goal[2])
        carried = goal[2] > rest + 0.06 or target.out[2] > 0.05  # others are pushed, most often
        if mode in ("coming", "near", "anywhere") and rng.random() < (0.5 if carried else 0.2):
            position[2] += rng.uniform(0, 0.2)
        position[2] = max(position[2], lowest)
    put_object(env, thing, position)

def scatter(env, kind: dict, rng) -> None:
    """Put the task's furniture, joints and objects into a random state."""
    forward(env)
    env.reset_model()  # furniture and marker; the hand's part of it is taken out
    forward(env)
    for joint in kind["joints"]:
        values = [rng.normal() * 0.02, 1 + rng.normal() * 0.03, rng.uniform()]
        share = rng.choice(values, p=[0.22, 0.22, 0.56])
        value = joint.low + share * (joint.high - joint.low)
        env.data.qpos[joint_address(env, joint.name)] = value
    forward(env)
    for i in range(len(kind["objects"])):
        scatter_object(env, kind, i, rng)
        forward(env)

def pierced(env, root: int, spared: set) -> bool:
    """Whether a thing (a root body) is more than a centimetre inside another, but the spared."""
    roots = env.model.body_rootid[env.model.geom_bodyid]
    for contact in env.data.contact:
        pair = {roots[contact.geom1], roots[contact.geom2]}
        if contact.dist < -0.01 and root in pair and len(pair) == 2 and not pair & spared:
            return True
    return False

def move_hand(env, place: np.ndarray) -> None:
    """Let the arm swing its hand to a place through whatever is in the way."""
    import mujoco
    contacts = int(mujoco.mjtDisableBit.mjDSBL_CONTACT)
    env.model.opt.disableflags |= contacts
    env.data.mocap_pos[0] = place + (0, 0, 0.045)
    env.data.mocap_quat[0] = (1, 0, 1, 0)
    mujoco.mj_step(env.model, env.data, nstep=50)
    env.model.opt.disableflags &= ~contacts

def hand_places(kind: dict) -> list:
    """The places that the hand may be near to: the kind's parts, and where to grasp its objects."""
    places = [part.place for part in kind["parts"]]
    return places + [[thing.body, *thing.grasp] for thing in kind["objects"]]

def choose_hand(env, kind: dict, rng) -> tuple[np.ndarray, int | None]:
    """A place for the hand, mostly near something, and the object that it holds there, if any: what
    is in the air is held, most often."""
    for i, thing in enumerate(kind["objects"]):
        if thing.rest is None:
            continue
        place = locate(env, thing.body)
        chance = 0.35 if kind["targets"] else 0.05
        if place[2] > thing.rest + 0.02:
            gaps = [np.linalg.norm(place - locate(env, target.place))
                    for target in kind["targets"] if target.thing == i]
            if min(gaps, default=1) >= 0.05:
                chance = 0.85  # it floats
        if rng.random() < chance:
            return place + thing.grasp, i
    places = hand_places(kind)
    main = not kind["targets"] and rng.random() < 0.6
    at = locate(env, places[0 if main else rng.integers(len(places))])
    mode = rng.random()
    if mode < 0.4:
        at = at + rng.normal(size=3) * (0.03, 0.04, 0.03)
    elif mode < 0.6:
        at = at + (0, 0, rng.uniform(0.04, 0.2)) + rng.normal(size=3) * 0.015
    elif mode < 0.75:
        at = at + rng.normal(size=3) * 0.1
    else:
        at = rng.uniform((-0.5, 0.4, 0.01), (0.35, 0.85, 0.35))
    return np.clip(at, (-0.5, 0.36, 0.0), (0.55, 0.93, 0.42)), None

def make_scene(env, task: str, home: np.ndarray, rng) -> np.ndarray:
    """Put simulator and hand into a random state, from the qpos home of the things; its measures,
    in the order of facts_of(). Tries again, 8 times, where things are in each other."""
    kind = KIND_OF[task]
    data = env.data
    fingers = [joint_address(env, "r_close"), joint_address(env, "l_close")]
    robot = [joint_address(env, f"right_j{i}") for i in range(7)] + fingers
    names = ["hand", "tablelink"]  # other things are loose
    names += [thing.body for thing in kind["objects"] if isinstance(thing.joint, str)]
    arm, table, *loose = [int(env.model.body_rootid[env.model.body(name).id]) for name in names]
    for _ in range(8):
        now = data.qpos[robot].copy()
        data.qpos[:] = home
        data.qvel[:] = 0
        data.qpos[robot] = now
        scatter(env, kind, rng)
        if any(pierced(env, root, {arm, table}) for root in loose):  # some lie in the table a bit
            continue
        state = data.qpos.copy()
        place, held = choose_hand(env, kind, rng)
        move_hand(env, place)
        state[robot] = data.qpos[robot]
        data.qpos[:] = state
        data.qvel[:] = 0
        spread = rng.choice([0, 1, rng.uniform()], p=[0.4, 0.4, 0.2])
        data.qpos[fingers] = (0.04 * (1 - spread), -0.03 * (1 - spread))
        if held is not None:
            data.qpos[fingers] = (0.025, -0.025)
        forward(env)
        if held is not None:
            thing = kind["objects"][held]
            put_object(env, thing, env.tcp_center - thing.grasp)
            forward(env)
        if not pierced(env, arm, set(loose)):
            break
    right, left = data.qpos[fingers]
    return measure(env, task, held, 1 - (right - left) / 0.07)

def measure(env, task: str, held: int | None, spread: float) -> np.ndarray:
    """The measures of the simulator's state, in the order of facts_of()."""
    kind = KIND_OF[task]
    hand = locate(env, "hand")
    places = hand_places(kind)
    values = []
    for what, i in facts_of(task):
        if what == "spread":
            value = spread
        elif what == "height":
            value = hand[2]
        elif what == "held":
            value = held == i
        elif what == "joint":
            joint = kind["joints"][i]
            value = env.data.qpos[joint_address(env, joint.name)] - joint.low
            value /= joint.high - joint.low
        elif what == "lift":
            thing = kind["objects"][i]
            value = locate(env, thing.body)[2] - thing.rest
        elif what == "target":
            target = kind["targets"][i]
            thing = kind["objects"][target.thing]
            gaps = locate(env, thing.body) - locate(env, target.place)
            value = np.linalg.norm(gaps[:2] if thing.rest is None else gaps)
        elif what == "part":
            value = np.linalg.norm(hand - locate(env, places[i]))
        elif what == "above":
            gaps = hand - locate(env, places[i])
            value = gaps[2] > 0.05 and np.linalg.norm(gaps[:2]) < 0.05
        elif what == "flag":
            flag = kind["flags"][i]
            value = locate(env, flag.place)[flag.axis] - flag.limit
        values.append(value)
    return np.float32(values)

def collect_task(job: dict) -> None:
    """Make the scenes of one environment and write them as an .npz file."""
    task = job["task"]
    env, _, renderer = vlmrm.open_task(task, 96)
    rng = np.random.default_rng([job["seed"], zlib.crc32(task.encode())])
    vlmrm.seed_starts(env, int(rng.integers(2**31)))
    env.reset()
    env._reset_hand = lambda *_: None  # the slow part of a reset; move_hand() does it
    home = env.data.qpos.copy()
    measures = []
    strips = []
    for first in range(0, job["count"], 24):
        pictures = []
        for _ in range(min(24, job["count"] - first)):
            measures.append(make_scene(env, task, home, rng))
            pictures.append(vlmrm.draw(renderer, env.data, {}))
        strips.append(vlmrm.pack_pictures(pictures))
    renderer.close()
    file = io.BytesIO()
    np.savez(file, measures=np.stack(measures), offsets=np.cumsum([0, *map(len, strips)]),
             strips=np.frombuffer(b"".join(strips), np.uint8))
    vlmrm.write_whole(job["scenes"] / f"{task}.npz", file.getvalue())

def collect(args) -> None:
    """Make the scenes of args.tasks in parallel processes, a file of each environment in the folder
    args.scenes, but for those that are there: the same bytes whatever the number of workers."""
    args.scenes.mkdir(parents=True, exist_ok=True)
    made = {"seed": args.seed, "count": args.count}
    note = args.scenes / "made.json"  # else a test might be of the scenes that were trained on
    if note.exists() and vlmrm.read_json(note) != made:
        raise vlmrm.InputError(f"{args.scenes} has scenes of another --seed or --count")
    vlmrm.write_whole(note, vlmrm.to_json(made))
    jobs = [dict(vars(args), task=task) for task in args.tasks
            if not (args.scenes / f"{task}.npz").exists()]
    with ProcessPoolExecutor(  # as in vlmrm.collect()
            args.workers, multiprocessing.get_context("spawn"),
            signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        for _ in tqdm(pool.map(collect_task, jobs), "collecting", len(jobs)):
            pass
    print(f"the scenes of {len(args.tasks)} environments are in {args.scenes}")

# 3. Training --------------------------------------------------------------------------------------

def load_scenes(folder: Path, tasks: list[str]) -> dict:
    """Scenes of some environments, N in all: "pictures" uint8 (N, 96, 96, 3), "true" bool (N, F),
    which of all facts hold, and of each task its "rows", its "facts", their "numbers"."""
    files = {}
    facts = {}
    numbers = {}
    known = {}  # {(nouns, phrases, other nouns): number}
    for task in tasks:
        with vlmrm.reading(folder / f"{task}.npz"):
            files[task] = dict(np.load(folder / f"{task}.npz", allow_pickle=False))
            if files[task]["measures"].shape[1] != len(facts_of(task)):
                raise ValueError("scenes.json has other measures: collect it again")
        facts[task] = numbered_facts(task)
        numbers[task] = np.array([known.setdefault(fact[3:6], len(known)) for fact in facts[task]])
    count = sum(len(file["measures"]) for file in files.values())
    pictures = np.empty((count, 96, 96, 3), np.uint8)
    true = np.zeros((count, len(known)), bool)
    rows = {}
    first = 0
    for task, file in tqdm(files.items(), "loading"):
        values = file["measures"]
        strips = [file["strips"][a:b].tobytes() for a, b in itertools.pairwise(file["offsets"])]
        rows[task] = np.arange(first, first + len(values))
        for start, strip in zip(itertools.count(first, 24), strips):
            strip = np.asarray(Image.open(io.BytesIO(strip)).convert("RGB"))
            unpacked = strip.reshape(-1, 96, 96, 3)
            pictures[start:start + len(unpacked)] = unpacked
        for (k, low, high, *_), number in zip(facts[task], numbers[task]):
            true[rows[task], number] |= (low <= values[:, k]) & (values[:, k] < high)
        first += len(values)
    return {"pictures": pictures, "true": true, "facts": facts, "numbers": numbers, "rows": rows}

def describe(scenes: dict, task: str, rows, rng, tokenizer) -> tuple[list[str], np.ndarray]:
    """A caption of each of some scenes of an environment, n, and what they say, float (n, F)."""
    numbers = scenes["numbers"][task]
    texts = []
    said = np.zeros((len(rows), scenes["true"].shape[1]), np.float32)
    for i, row in enumerate(rows):
        true = scenes["true"][row, numbers]
        text, which = caption(rng, scenes["facts"][task], true, tokenizer)
        said[i, numbers[which]] = 1
        texts.append(text)
    return texts, said

def agreement(scenes: dict, rows: np.ndarray, said: np.ndarray) -> np.ndarray:
    """Which caption is true of which scene: bool (n, n), scenes down, captions across. Some of what
    a caption says is false where the count of its true facts falls short."""
    return scenes["true"][rows].astype(np.float32) @ said.T == said.sum(1)

def augment(pictures: np.ndarray, rng, shift: int = 4, light: float = 0.15) -> np.ndarray:
    """Pictures (n, 96, 96, 3) moved by up to 4 pixels either way, brighter or darker by 15 %."""
    size = pictures.shape[1]
    moves = rng.integers(0, 2 * shift + 1, (len(pictures), 2))
    wide = np.pad(pictures, ((0, 0), (shift, shift), (shift, shift), (0, 0)), "edge")
    gains = np.uint16(128 * (1 + light * rng.uniform(-1, 1, len(pictures))))
    moved = []
    for picture, (y, x), gain in zip(wide, moves, gains):
        lit = picture[y:y + size, x:x + size] * gain >> 7
        moved.append(np.minimum(lit, 255).astype(np.uint8))
    return np.stack(moved)

def contrast(frames, texts, true, scale) -> torch.Tensor:
    """CLIP's loss with all true captions of a scene, and all scenes of a caption, as positives.
    frames, texts (n, D), unit; true (n, n)."""
    logits = scale * frames @ texts.T
    true = true.float()
    loss = 0
    for positive, scores in ((true, logits), (true.T, logits.T)):
        share = positive / positive.sum(1, keepdim=True)
        loss = loss - (share * scores.log_softmax(1)).sum(1).mean()
    return loss / 2

@torch.inference_mode()
def held_out(model, scenes: dict, choices: int = 40) -> tuple[float, float]:
    """How often a scene's own caption comes first of some 40 different ones of its environment, and
    how often any caption does that is true of it."""
    model.eval()
    own = []
    any_true = []
    for task, rows in scenes["rows"].items():
        texts, said = describe(scenes, task, rows, np.random.default_rng(0), model.tokenizer)
        _, places = np.unique(texts, return_index=True)
        kept = np.sort(places)[:choices]
        frames = model.embed_frames(scenes["pictures"][rows[kept]])
        captions = model.embed_texts([texts[k] for k in kept])
        first = (frames @ captions.T).argmax(1).cpu().numpy()
        diagonal = np.arange(len(kept))
        own.extend(first == diagonal)
        any_true.extend(agreement(scenes, rows[kept], said[kept])[diagonal, first])
    return float(np.mean(own)), float(np.mean(any_true))

def draw_batch(scenes: dict, step: int, args, tokenizer):
    """A batch of 256: 16 scenes of 16 environments each at first, later 32 of 8, so that most of
    what a caption has to be told from is the same environment in another state. Depends on seed
    and step alone. Returns pictures, captions and agreement()."""
    rng = np.random.default_rng([args.seed, step])
    count = min(16 if step <= args.steps // 5 else 8, len(args.tasks))
    rows = []
    texts = []
    said = []
    for task in rng.choice(args.tasks, size=count, replace=False):
        if len(scenes["rows"][task]) < 256 // count:
            raise vlmrm.InputError(f"{task} has fewer than {256 // count} scenes, a batch's share")
        chosen = rng.choice(scenes["rows"][task], size=256 // count, replace=False)
        captions, facts = describe(scenes, task, chosen, rng, tokenizer)
        rows.append(chosen)
        texts += captions
        said.append(facts)
    rows = np.concatenate(rows)
    true = agreement(scenes, rows, np.concatenate(said))
    return augment(scenes["pictures"][rows], rng), texts, true

def train(args) -> None:
    """Train tiny from random weights, and write them to args.out, or go on; say how it does on
    scenes of another seed, if there are some. Same seed, CPU and number of threads: same bytes. The
    file says which environments it has seen."""
    model = vlmrm.prepare_model(
        {"backbone": "tiny", "pretrained": "none", "lora": 0, "seed": args.seed})
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05, fused=True)
    scenes = load_scenes(args.scenes, args.tasks)
    test = load_scenes(args.test, args.tasks) if args.test else None
    settings = {name: getattr(args, name) for name in ("tasks", "seed", "count", "steps")}
    settings["scenes"] = vlmrm.digest(*[args.scenes / f"{task}.npz" for task in args.tasks])
    saved = Path(f"{args.out}.checkpoint")
    rng = np.random.default_rng(args.seed)  # not used here, but part of a checkpoint
    losses = []
    if saved.exists():
        losses = vlmrm.load_checkpoint(saved, model, optimizer, rng, settings)
    first = len(losses) + 1
    bar = tqdm(range(first, args.steps + 1), "training", args.steps, initial=first - 1)
    thread = ThreadPoolExecutor(1)  # draws the next batch meanwhile
    ahead = thread.submit(draw_batch, scenes, first, args, model.tokenizer)
    for step in bar:
        pictures, texts, true = ahead.result()
        ahead = thread.submit(draw_batch, scenes, step + 1, args, model.tokenizer)
        model.train()
        frames = model.embed_frames(pictures)
        true = torch.tensor(true, device=frames.device)
        scale = model.clip.logit_scale.exp().clamp(max=100)
        loss = contrast(frames, model.embed_texts(texts), true, scale)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rise = step / (args.steps // 20 + 1)
        fall = 0.5 + 0.5 * math.cos(math.pi * (step - 1) / args.steps)
        optimizer.param_groups[0]["lr"] = RATE * min(rise, fall)
        optimizer.step()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if step % max(1, args.steps // 20) == 0:
            vlmrm.save_checkpoint(saved, model, optimizer, rng, losses, settings)
            if test:
                own, any_true = held_out(model, test)
                print(f"step {step}: own caption first {own:.3f}, a true one {any_true:.3f}",
                      flush=True)
    thread.shutdown(cancel_futures=True)
    made_of = vlmrm.to_json({"environments": args.tasks, "seed": args.seed, "steps": args.steps})
    # One entry: the order of several would be another one each time.
    content = save(vlmrm.trained_weights(model), metadata={"made_of": made_of.decode()})
    vlmrm.write_whole(args.out, content)
    saved.unlink(missing_ok=True)

def work(args) -> None:
    """Collect or train."""
    if args.fold is not None:
        unseen = left_out(args.fold)
        args.tasks = [task for task in args.tasks if task not in unseen]
    if not args.tasks:
        raise vlmrm.InputError("no environment is left: --fold leaves out all of --tasks")
    if args.count < 1:
        raise vlmrm.InputError("--count is below 1")
    if args.mode == "collect":
        collect(args)
        return
    name = "all" if args.fold is None else f"fold{args.fold}"
    args.out = args.out or Path("runs/starts") / f"{name}.safetensors"
    common.check_outputs(args.out)
    train(args)

def parser() -> common.Parser:
    """The options."""
    options = common.Parser("scenes", description=__doc__)
    add = options.add_argument
    add("mode", choices=("collect", "train"))
    add("--scenes", type=Path, default=Path("runs/scenes"), help="their folder (runs/scenes)")
    add("--test", type=Path, help="a folder of scenes of another seed, to judge by")
    add("--tasks", nargs="+", choices=KIND_OF, default=sorted(KIND_OF), metavar="TASK",
        help="environments (all 50)")
    add("--fold", type=int, choices=range(5), help="without those of its ten tasks")
    add("--seed", type=int, default=0, help="of all that is random (0)")
    add("--count", type=int, default=4000, help="scenes of each environment (4000)")
    add("--workers", type=int, default=os.cpu_count(), help="processes (one a core)")
    add("--steps", type=int, default=5000, help="optimiser steps (5000)")
    add("--out", type=Path, help="where weights go (runs/starts/fold0.safetensors)")
    return options

if __name__ == "__main__":
    sys.exit(common.main(parser(), work))
