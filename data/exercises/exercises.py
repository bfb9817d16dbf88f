"""Check answers to the exercises, which are in README.md beside this file.

  python data/exercises/exercises.py       where the exercises are
  python data/exercises/exercises.py 3     check the answer to the third

A check gets the answer, or the path of the file that is it. It returns whether it is right, and a
remark for the reader.
"""
import runpy
import sys
import tempfile
import warnings
from pathlib import Path

PAGE = Path(__file__).resolve().with_name("README.md")
ROOT = PAGE.parents[2]  # the answers are here
sys.path.insert(0, str(ROOT))

import vlmrm  # before torch: see there

import numpy as np
import torch
import torch.nn.functional as F

FOOLED = "faucet-open-v3"  # the task of exercise 11
FILES = {5: "answer_5.npz", 6: "answer_6.npz", 8: "answer_8.py"}  # all others are in answers.py

def configuration(objective: str, *options: str) -> dict:
    """The configuration of a run of seed 0 with these options."""
    return vlmrm.configuration(vlmrm.parse_arguments(list(options)), objective, 0)

def all_losses() -> dict:
    """{name: loss} of vlmrm.py and data/objectives/, but for those that read the simulator."""
    paths = {path.stem: str(path) for path in (vlmrm.DATA / "objectives").glob("*.py")}
    paths.update({name: name for name in vlmrm.OBJECTIVES})
    found = {}
    for name in sorted(paths):
        objective = vlmrm.get_objective(paths[name])
        if objective["loss"] and objective["LABELS"] == "times":
            found[name] = objective["loss"]
    return found

def random_batch(seed: int):
    """Frames (6, 5, 16) and texts (6, 16), unit vectors, and times (6, 5)."""
    generator = torch.Generator().manual_seed(seed)
    vectors = F.normalize(torch.randn(6, 6, 16, generator=generator), dim=-1)
    return vectors[:, :5], vectors[:, 5], torch.linspace(0, 1, 5).expand(6, 5)

def loss_value(loss) -> torch.Tensor:
    """The value of a loss on one random batch."""
    if vlmrm.takes_before(loss):
        return loss(*random_batch(0), before=random_batch(1)[:2])
    return loss(*random_batch(0))

def check_1(answer):
    cosines = torch.tensor([0.0, 0.3, 0.2, 0.2, 0.6])
    frames = torch.stack([cosines, (1 - cosines**2).sqrt()], dim=-1)[None]  # (1, 5, 2)
    loss = vlmrm.triplet_loss(frames, torch.tensor([[1.0, 0.0]]), None).item()
    return abs(answer - loss) < 1e-4, f"you said {answer}"

def planted_loss(frames, texts, times, scale: float = 100.0):
    """The loss of exercise 2, with its mistake."""
    frames = F.normalize(frames, dim=-1)
    texts = F.normalize(texts, dim=-1)
    videos, length, _ = frames.shape
    progress = torch.zeros(videos, videos)
    for i in range(videos):
        for j in range(videos):
            rewards = frames[i] @ texts[j]  # (K,)
            early = rewards[:length // 2].sum()
            late = rewards[length // 2:].sum()
            progress[i, j] = scale * (late - early)
    own = torch.arange(videos)
    return (F.cross_entropy(progress, own) + F.cross_entropy(progress.T, own)) / 2

def check_2(answer):
    right = vlmrm.get_objective(str(vlmrm.DATA / "objectives" / "decisionnce-p.py"))["loss"]
    batches = [random_batch(seed) for seed in range(5)]
    worst = np.max([abs(answer(*batch) - right(*batch)).item() for batch in batches])  # NaN counts
    return worst < 1e-3, f"the largest difference from DecisionNCE-P is {worst:.4f}"

def check_3(answer):
    x = torch.linspace(-1, 1, 20001, dtype=torch.float64)

    def difference(s):
        return (F.softplus(s * x) / s - x.relu()).max().item()

    right = difference(1.01 * answer) <= 0.01 <= difference(0.99 * answer)
    return right, f"at s = {answer} the largest difference is {difference(answer):.5f}"

def check_4(answer):
    falling = 0
    for seed in range(50):
        frames = random_batch(seed)[0]
        texts = answer(frames.clone())
        unit = torch.ones(6)
        if texts.shape != (6, 16) or not torch.allclose(texts.norm(dim=-1), unit, atol=1e-4):
            return False, "the sentences must be six unit vectors, (6, D)"
        rewards = torch.einsum("btd,bd->bt", frames, texts).numpy()
        falling += int((vlmrm.value_order_correlation(rewards) < 0).sum())
    return falling == 300, f"the reward falls in {falling} of 300 videos"

def check_5(path):
    data = vlmrm.Dataset(path)
    known = vlmrm.load_instructions(vlmrm.DATA / "instructions.json")
    new = set(data.task.tolist()) - set(known)
    experts = {task: len(data.select(task=task, source="expert")) for task in new}
    task = max(experts, key=experts.get, default=None)
    if not task or experts[task] < 10:
        return False, f"experts of tasks that are not Meta-World's: {experts}"
    config = configuration("triplet", "--batch", "1", "--data", str(path),
                           "--instructions", str(path.with_suffix(".json")))
    with tempfile.TemporaryDirectory() as folder:
        _, metrics = vlmrm.run(config, Path(folder))
    voc = metrics["tasks"][task]["voc"]
    return voc > 0.5, f"VOC on the test experts {voc:.2f}"

def check_6(path):
    mine = vlmrm.Dataset(path)
    shipped = vlmrm.Dataset(vlmrm.DATA / "metaworld.npz")
    first = shipped.select(task="drawer-open-v3")[0]
    pictures = mine.pictures(0).astype(int)
    old = shipped.pictures(first)
    same = np.allclose(mine.rewards[0], shipped.rewards[first], atol=1e-3)
    if pictures.shape != old.shape or not same:
        return False, "its first episode is not the one of the shipped data: change the camera only"
    # A picture that is turned or mirrored is no new camera.
    flips = (old, old[:, ::-1], old[:, :, ::-1], old[:, ::-1, ::-1])
    apart = min([np.abs(pictures - flipped).mean() for flipped in flips])
    return apart > 10, f"its pictures differ from the old camera's by {apart:.0f} grey levels"

def check_7(answer):
    torch.manual_seed(0)
    model = answer()
    config = configuration("triplet", "--learning-rate", "2e-3")
    kinds = [type(part) for part in model.clip.visual.modules()]
    if torch.nn.MultiheadAttention in kinds or kinds.count(torch.nn.Conv2d) < 2:
        return False, "its vision tower has attention in it, or fewer than two Conv2d"
    data = vlmrm.Dataset(config["data"])
    instructions = vlmrm.load_instructions(config["instructions"])
    vlmrm.train(model, data, instructions, vlmrm.triplet_loss, config)
    voc = vlmrm.evaluate(model, data, instructions)["seen"]["voc"]["value"]
    return voc > 0.9, f"VOC on seen tasks {voc:.2f}"

def check_8(path):
    answer = vlmrm.get_objective(str(path))
    usual = answer["reward"] is vlmrm.cosine_reward and answer["LABELS"] == "times"
    if not answer["loss"] or not usual:
        return False, "it takes a loss, the reward is the cosine, and the labels are the times"
    value = loss_value(answer["loss"])
    for name, loss in all_losses().items():
        if torch.isclose(loss_value(loss), value):
            return False, f"this is {name}"
    scores = []
    for objective in (str(path), "triplet"):
        config = configuration(objective, "--lora", "0", "--learning-rate", "2e-3")
        _, metrics = vlmrm.run(config, ROOT / "runs" / "rough")
        unseen = metrics["unseen"]
        scores.append((unseen["voc"]["value"], unseen["voc_opposite"]["value"]))
    mine, triplet = scores
    return mine[0] > triplet[0] and mine[1] < triplet[1], (
        f"on unseen tasks VOC {mine[0]:.2f} (triplet {triplet[0]:.2f}), under the opposite "
        f"sentence {mine[1]:.2f} (triplet {triplet[1]:.2f})")

# Of our losses: those in which what a video learns depends on another video's sentence, and others.
MIXING = ("anchored", "clip", "decisionnce-p", "decisionnce-t", "hilp-text", "liv", "progress",
          "r3m", "tcn-text", "triplet-directions", "vip-text", "vlc")
ALONE = ("hilp", "hop", "preference", "tcn", "timerewarder", "triplet", "vip")

def nameless(loss):
    """A loss of three arguments that does not tell its name."""
    def wrapped(frames, texts, times):
        if vlmrm.takes_before(loss):
            return loss(frames, texts, times, before=(frames.detach(), texts.detach()))
        return loss(frames, texts, times)

    return wrapped

def check_9(answer):
    losses = all_losses()
    wrong = []
    for name in sorted(MIXING + ALONE):
        if bool(answer(nameless(losses[name]))) != (name in MIXING):
            wrong.append(name)
    return not wrong, f"wrong about {', '.join(wrong) or 'none'} of {len(MIXING + ALONE)} losses"

def one_backward_pass(model, loss, pictures, sentences):
    """What exercise 10 has to match."""
    loss(model.embed_frames(pictures), model.embed_texts(sentences)).backward()

def gradients(fill, loss, pictures, sentences) -> tuple[torch.Tensor, float]:
    """All gradients that fill() leaves in a new model, in one vector, and the most videos (or
    sentences) that it embedded at once."""
    model = vlmrm.prepare_model(configuration("triplet"), "cpu")
    model.low_precision = False
    embed_frames = model.embed_frames
    embed_texts = model.embed_texts
    most = [0]

    def watched_frames(some):
        most.append(np.size(some) / pictures[0].size)
        return embed_frames(some)

    def watched_texts(some):
        most.append(len(some))
        return embed_texts(some)

    model.embed_frames = watched_frames
    model.embed_texts = watched_texts
    fill(model, loss, pictures, sentences)
    trained = [weight for weight in model.parameters() if weight.grad is not None]
    return torch.cat([weight.grad.ravel() for weight in trained]), max(most)

def check_10(answer):
    data = vlmrm.Dataset(vlmrm.DATA / "metaworld.npz")
    instructions = vlmrm.load_instructions(vlmrm.DATA / "instructions.json")
    tasks = list(instructions)[:8]
    sentences = [instructions[task]["instruction"] for task in tasks]
    episodes = [data.select(task=task)[0] for task in tasks]
    pictures = np.stack([data.pictures(e)[[0, 8, 9, 15, 23]] for e in episodes])

    def loss(frames, texts):
        return vlmrm.info_nce(9 * frames[:, -1] @ texts.T)

    whole, _ = gradients(one_backward_pass, loss, pictures, sentences)
    mine, most = gradients(answer, loss, pictures, sentences)
    if len(mine) != len(whole):
        return False, "not every weight has got its gradient"
    wrong = ((whole - mine).norm() / whole.norm()).item()
    return wrong < 1e-4 and most <= 2, (
        f"the gradient is wrong by {wrong:.1e} of itself; at most {most:g} videos at once")

def check_11(answer):
    sys.path.insert(0, str(vlmrm.DATA / "study"))
    import guide
    import planning
    warnings.simplefilter("ignore")  # Meta-World's

    plan = np.array(answer, float)
    if plan.shape != (planning.KNOTS, 4) or not (np.abs(plan) <= 1).all():
        return False, f"a plan is ({planning.KNOTS}, 4), all of it from -1 to 1"
    folder, _ = vlmrm.run(configuration("triplet"), ROOT / "runs")
    models = guide.load_models([folder], "cpu")
    sentence = vlmrm.load_instructions(vlmrm.DATA / "instructions.json")[FOOLED]["instruction"]
    scene = planning.open_scene(FOOLED, np.random.default_rng(11))
    outcome = planning.carry_out(scene["env"], scene["state"], plan)
    liked = guide.share_of_experts("triplet", outcome, scene, models, sentence)
    said = guide.share_of_experts("simulator", outcome, scene, models, sentence)
    scene["renderer"].close()
    if np.isnan(liked):
        return False, "triplet's reward does not rise with experts: train it again"
    done = any(outcome["success"])
    return liked >= 0.8 and said < 0.2 and not done, (
        f"with it triplet's reward rises by {liked:.2f} of what it does with experts, the "
        f"simulator's by {said:.2f}; the task is {'' if done else 'not '}done")

CHECKS = (check_1, check_2, check_3, check_4, check_5, check_6, check_7, check_8, check_9, check_10,
          check_11)

def find_answer(number: int, path: Path):
    """The answer in answers.py, or the path of the file that is the answer. Raises InputError."""
    if not path.is_file():
        raise vlmrm.InputError(f"there is no {path}")
    if number in FILES:
        return path
    defined = runpy.run_path(str(path))
    if f"answer_{number}" not in defined:
        raise vlmrm.InputError(f"{path} does not define answer_{number}")
    return defined[f"answer_{number}"]

def main(argv: list[str]) -> int:
    """The program. Returns its exit code: 0 if right, 1 if not yet, 2 without such an exercise."""
    if not argv:
        print(f"the exercises are in {PAGE}; python data/exercises/exercises.py 3 checks the third")
        return 0
    numbers = [str(number + 1) for number in range(len(CHECKS))]
    if len(argv) > 1 or argv[0] not in numbers:
        print(f"there are the exercises 1 to {len(CHECKS)}", file=sys.stderr)
        return 2
    number = int(argv[0])
    path = ROOT / FILES.get(number, "answers.py")
    try:
        with vlmrm.running(str(path)):  # what goes wrong in the reader's code is one line
            right, remark = CHECKS[number - 1](find_answer(number, path))
    except (vlmrm.InputError, OSError) as problem:
        right = False
        remark = " ".join(str(problem).split())
    print(f"{'right' if right else 'not yet'}: {remark}")
    return 0 if right else 1

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
