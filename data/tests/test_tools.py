"""Tests of the tools: what all of them do, a data set of films, a film of rewards, a model for the
Hub, and an environment with a learned reward. LeRobot's data have a file of their own."""
import base64
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import weakref
from pathlib import Path

import vlmrm  # before torch: see there

import gymnasium
import imageio.v3 as imageio
import numpy as np
import pytest
from PIL import Image, features

import common
import environment
import films
import hub
import lerobot
import show
from conftest import GROWING, command, one_line, read_kept, refuses

INSTRUCTIONS = vlmrm.load_instructions(vlmrm.DATA / "instructions.json")
PICTURES = np.random.default_rng(0).integers(0, 256, (3, 40, 56, 3), dtype=np.uint8)

# -----------------------------------------------------------------------------
# What all tools do

def test_tools_run_from_any_folder(tmp_path):
    """common.py, which each imports before anything else, sees to it."""
    for tool in (films, lerobot, show, hub):
        lines = Path(tool.__file__).read_text().splitlines()
        imports = [line for line in lines if re.match("(import|from) ", line)]
        assert imports[0].startswith("import common")
    status, printed, error = command("--help", cwd=tmp_path, script=lerobot.__file__)
    assert (status, error) == (0, "")
    assert "\n    python data/tools/lerobot.py read FOLDER" in printed

@pytest.mark.parametrize("main, arguments, says", [
    (films.main, "films --sentences towel.json", "--out"),
    (films.main, "films --sentences towel.json --out new.npz --frames 4", "between 5"),
    (films.main, "films --sentences towel.json --out new.npz --size 0", "between 8"),
    (films.main, "films --sentences towel.json --out new.npz --frames 999 --size 99", "16383"),
    (films.main, "films --sentences towel.json --out new.npz --frames many", "invalid int value"),
    (lerobot.main, "", "read|progress"),
    (lerobot.main, "read a --out new.npz", "--sentences"),
    (lerobot.main, "read a --out new.npz --sentences s.json --frames 4", "between 5"),
    (lerobot.main, "read a --out new.npz --sentences s.json --episodes 0", "--episodes 0 is none"),
    (lerobot.main, "progress run a --size -96", "between 8"),
    (lerobot.main, "progress run", "folder"),
    (show.main, "run clip.gif", "under which sentence"), (show.main, "run", "run/config.json"),
    (show.main, "run --out page.gif", "must end with .html"),
    (show.main, "run --out new.gif clip.gif open", "run/config.json"),
    (show.main, "run clip.gif --out new.gif open close", "run/config.json"),
    (show.main, "run clip.gif open --out reward.avi", "must end with .gif or .mp4"),
    (show.main, "run clip.gif open", "cannot read run/config.json"),
    (hub.main, "run new", "cannot read run/config.json"),
    (hub.main, "run", "out")])
def test_bad_options_are_one_line(place, capsys, main, arguments, says):
    before = sorted(place.rglob("*"))
    refuses(main, arguments.split(), capsys, says)
    assert sorted(place.rglob("*")) == before

@pytest.mark.parametrize("main, arguments", [
    (films.main, "films --sentences towel.json --out kept"),
    (films.main, "films --sentences kept --out kept"),
    (lerobot.main, "read a --out kept --sentences new"),
    (lerobot.main, "read a --out new --sentences kept"),
    (lerobot.main, "read a --out new --sentences new"),
    (lerobot.main, "progress run data"),
    (show.main, "run clip.gif open --out kept.gif"),
    (show.main, "run kept.gif open --out kept.gif"),
    (show.main, "run clip.gif open"),
    (hub.main, "run kept"),
    (hub.main, "run films")])
def test_no_output_takes_the_place_of_a_file(place, capsys, monkeypatch, main, arguments):
    """And that is said before the work."""
    Path("data").mkdir()
    for name in ("kept", "kept.gif", "clip-reward.gif", "data/sarm_progress.parquet"):
        Path(name).write_text("precious")
    monkeypatch.setattr(common, "read_pictures", lambda path: pytest.fail("worked"))
    monkeypatch.setattr(vlmrm, "load_reward_model", lambda *_: pytest.fail("worked"))
    before = {path: path.is_file() and path.read_bytes() for path in place.rglob("*")}
    refuses(main, arguments.split(), capsys, "exists")
    assert {path: path.is_file() and path.read_bytes() for path in place.rglob("*")} == before

@pytest.mark.parametrize("main, arguments", [
    (lerobot.main, "progress run data"), (show.main, "run clip.gif open"), (hub.main, "run new")])
def test_using_a_model_runs_no_code_of_its_run(place, finished, capsys, main, arguments):
    """Neither if it may be used, nor if it was not trained for the cosine."""
    shutil.copytree(finished, "run")
    imageio.imwrite("clip.gif", GROWING)
    if main is lerobot.main:
        pytest.importorskip("pyarrow")
        from test_lerobot import lerobot_folder
        lerobot_folder(Path("data"), said=["push"] * 4)
    Path("evil.py").write_text("open('ran', 'w')\ndef loss(frames, texts, times): pass\n")
    config = dict(read_kept(Path("run"), "config.json"), objective=str(Path("evil.py").resolve()))
    for cosine, status in ((False, 2), (True, 0)):
        Path("run/config.json").write_bytes(vlmrm.to_json(dict(config, cosine=cosine)))
        code = main(arguments.split())
        if status:
            one_line(capsys, "not trained for the cosine", name=main.__module__)
        assert code == status or "rise" in capsys.readouterr().err  # it learned for two steps
        assert not Path("ran").exists()

@pytest.mark.parametrize("main, arguments, name", [
    (films.main, "films --sentences towel.json --out new.npz", "read_pictures"),
    (lerobot.main, "progress run data", "load_reward_model"),
    (show.main, "run clip.gif open", "load_reward_model"),
    (hub.main, "run new", "load_reward_model")])
def test_ctrl_c_is_one_line(place, capsys, monkeypatch, main, arguments, name):
    def stop(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(common if name == "read_pictures" else vlmrm, name, stop)
    assert main(arguments.split()) == 130
    one_line(capsys, "stopped", name=main.__module__)

def test_table_by_hand():
    assert common.markdown_table([["", "a"], ["b", "1"], ["c", "2"]]) == (
        "|  | a |\n| --- | --- |\n| b | 1 |\n| c | 2 |")

@pytest.mark.parametrize("reads", [
    lambda model: films.read_film(Path("film"), 5, 8),
    lambda model: show.score(model, Path("film"), "open"),
    lambda model: sum(1 for _ in show.compose(Path("film"), {"open": list(range(200))}))])
def test_a_film_is_never_in_the_memory_as_a_whole(brightness, monkeypatch, reads):
    seen = []
    most = []

    def read_pictures(path):
        for k in range(200):
            picture = Image.new("RGB", (8, 8))
            seen.append(weakref.ref(picture))
            yield picture
            most.append(sum(reference() is not None for reference in seen))

    monkeypatch.setattr(common, "read_pictures", read_pictures)
    reads(brightness)
    assert len(most) >= 200 and max(most) <= 3

# -----------------------------------------------------------------------------
# films.py

def test_films_become_episodes(place, capsys):
    """Pictures evenly spread, success at the end of what is no failure."""
    assert films.main(["films", "--sentences", "towel.json", "--out", "towel.npz"]) == 0
    assert capsys.readouterr().out.endswith("wrote 6 films of 1 tasks to towel.npz\n")
    data = vlmrm.Dataset("towel.npz")
    assert data.source.tolist() == ["expert"] * 5 + ["mixed"]
    assert data.success.sum(1).tolist() == [1] * 5 + [0]
    assert data.success[:5, -1].all() and not data.rewards.any()
    assert (data.steps == np.linspace(0, 29, 24).round()).all() and data.S == 96
    for e in range(6):
        shades = data.pictures(e).mean((1, 2, 3))
        assert np.abs(shades - 8 * data.steps[e]).max() < 4

def test_what_is_no_film_is_left_out_and_said(place, capsys):
    folder = Path("films/fold-towel")
    shutil.move(folder / "failed", folder / "Failed")
    (folder / "more").mkdir()
    shutil.copy(folder / "2.gif", folder / "more/5.gif")
    no_films = [Path("films/notes.txt"), folder / "more"]
    for name in (".DS_Store", "2-reward.gif", "Failed/.hidden.mp4", "photo.JPG"):
        no_films.append(folder / name)
        shutil.copy(folder / "2.gif", folder / name)
    no_films[0].touch()
    assert films.main(["films", "--sentences", "towel.json", "--out", "towel.npz"]) == 0
    said = capsys.readouterr().out.splitlines()[0].split(": ")[1]
    assert set(said.split(", ")) == set(map(str, no_films))
    assert vlmrm.Dataset("towel.npz").source.tolist() == ["expert"] * 5 + ["mixed"]

def test_names_and_failures_that_would_mislead(place, capsys):
    """A task of one's own is never taken for one that nobody trains on; one failure tests nothing,
    which is said."""
    assert films.main("films --sentences towel.json --out towel.npz".split()) == 0
    assert "fold-towel: only 1 failing, none is left for the test" in capsys.readouterr().out
    for film in sorted(Path("films/fold-towel").glob("*.*"))[3:]:
        film.unlink()
    assert films.main("films --sentences towel.json --out few.npz".split()) == 0
    assert "fold-towel: only 3 successful, none is left" in capsys.readouterr().out
    shutil.move("films/fold-towel", "films/door-open-v3")
    refuses(films.main, "films --sentences towel.json --out a.npz".split(), capsys, "another name")
    [name] = lerobot.name_tasks([{"sentence": "Door open v3"}]).values()
    assert name == "door-open-v3-2"

@pytest.mark.parametrize("arguments, says", [
    ("films --frames 31", "30 pictures, fewer than 31"),
    ("odd", "'fold-rug'"),
    ("empty", "empty/fold-towel has no film of the task done"),
    ("none", "No such file"),
    ("odd/fold-rug", "no folders of tasks"),
    ("broken", "broken/fold-towel/9.mp4"),
    ("text", "text/fold-towel/notes.txt")])
def test_films_that_are_refused(place, capsys, arguments, says):
    for name in ("odd/fold-rug", "empty/fold-towel/failed", "broken/fold-towel", "text/fold-towel"):
        Path(name).mkdir(parents=True)
    shutil.copy("films/fold-towel/2.gif", "odd/fold-rug")
    Path("broken/fold-towel/9.mp4").touch()
    Path("text/fold-towel/notes.txt").write_text("no film")
    arguments += " --sentences towel.json --out new.npz"
    refuses(films.main, arguments.split(), capsys, says)
    assert not Path("new.npz").exists()

# -----------------------------------------------------------------------------
# show.py

@pytest.mark.parametrize("kind, out", [
    ("clip.gif", None), ("clip.mp4", None), ("clip", None), ("clip.png", None),
    ("clip.gif", "new/reward.mp4")])
def test_a_film_over_its_reward(kind, out, place, brightness):
    """As many pictures as there are; what is to come of the curve is pale."""
    pictures = GROWING[:1] if kind == "clip.png" else GROWING[5:17]
    if kind == "clip":
        Path("clip").mkdir()
        for k, picture in enumerate(pictures):  # 10.png comes after 9.png
            Image.fromarray(picture).save(f"clip/{k + 2}.png")
    else:
        imageio.imwrite(kind, pictures)
    options = ["--out", out] if out else []
    assert show.main(["run", kind, "push", "open $x$ and $_$", *options]) == 0
    written = out or "clip-reward.gif"
    assert imageio.immeta(written).get("fps", 8) == 8
    shown = imageio.imread(written).astype(int).reshape(-1, 320 + 240, 480, 3)
    assert len(shown) == len(pictures)
    expected = pictures.mean((1, 2, 3))
    assert np.abs(shown[:, :320].mean((1, 2, 3)) - expected).max() < 4
    dark = [(picture[320:] < 200).any(-1).sum() for picture in shown]
    assert dark == sorted(dark)
    assert len(dark) == 1 or dark[-1] > dark[0] + 200

def test_the_curve_is_where_its_columns_say():
    """The reward is 0 but for a peak: only there is anything drawn in the upper half."""
    curves, columns = show.draw_curves({"a": [0.0] * 7 + [1.0] + [0.0] * 5})
    assert curves.shape == (240, 480, 3) and len(columns) == 13
    blue = (curves[..., 2] > curves[..., 0].astype(int) + 50)
    tops = np.where(blue.any(0), blue.argmax(0), 240)
    assert abs(int(np.argmin(tops)) - columns[7]) <= 3
    assert (np.diff(columns) > 20).all()

def test_a_page_of_a_run(finished, toy, capsys):
    """Unseen tasks first; rewards as score() says; a browser, where there is one, shows them."""
    assert show.main([str(finished)]) == 0
    page = finished / "page.html"
    assert str(page) in capsys.readouterr().out
    text = page.read_text(encoding="utf-8")
    content = json.loads(re.search(r"const DATA = (.*);\n", text)[1])
    names = [episode["name"] for episode in content["episodes"]]
    assert names[0] == "drawer-open-v3, unseen task: expert, succeeds"
    assert "unseen" not in names[-1] and len(set(names)) == len(names) == 8
    assert content["title"] == "triplet-seed1: 8 of 32 test episodes"
    data = vlmrm.Dataset(toy.path)
    e = data.select(task="drawer-open-v3", source="expert", split="test")[0]
    first = content["episodes"][0]
    packed = base64.b64decode(first["strip"].partition(",")[2])
    assert np.asarray(Image.open(io.BytesIO(packed))).size == data.pictures(e).size
    model = vlmrm.load_reward_model(finished)
    sentence = INSTRUCTIONS["drawer-open-v3"]["instruction"]
    rewards = model.score(data.pictures(e), sentence)
    assert first["curves"][f"“{sentence}”"] == pytest.approx(rewards, abs=1e-5)
    assert [len(values) for values in first["curves"].values()] == [data.T] * 3
    assert show.main([str(finished)]) == 0  # drawn anew
    out = finished.parent / "notes.html"
    out.write_text("of someone else")
    refuses(show.main, [str(finished), "--out", str(out)], capsys, "notes.html exists")
    shown = in_browser(page)
    if shown:
        assert shown.count('points="10,') == 4 and f"{rewards[0]:.3f}</output>" in shown

def in_browser(page):
    """What a browser makes of a page, "" where there is none."""
    browser = shutil.which("chromium")
    if not browser:
        return ""
    return subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000",
         "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=60).stdout

def test_no_sentence_can_end_the_script_of_a_page(tmp_path):
    """It is shown as it is."""
    sentence = "</script><img src=x onerror=document.title=1> & \"'`${1} \u2028 \\n"
    episode = {"name": sentence, "strip": "", "curves": {sentence: [0.1, 0.2]},
               "simulator": [0.0, 0.0]}
    page = tmp_path / "page.html"
    page.write_text(show.page_of({"title": sentence, "episodes": [episode]}), encoding="utf-8")
    assert page.read_text(encoding="utf-8").count("</script>") == 1
    shown = in_browser(page)
    if shown:
        assert "<img" not in shown and shown.count("&lt;/script&gt;&lt;img src=x") >= 3

def test_a_page_is_of_the_data_of_its_run(finished, toy, capsys, monkeypatch):
    """Not of other episodes with the same numbers."""
    digest = vlmrm.digest

    def changed(*files):
        return "another" if files[0] == Path(toy.path).resolve() else digest(*files)

    monkeypatch.setattr(vlmrm, "digest", changed)
    refuses(show.main, [str(finished)], capsys, "npz has changed since")

@pytest.mark.parametrize("suffix", [".gif", ".mp4", ""])
def test_rewards_of_a_film(finished, toy, place, capsys, suffix):
    """A GIF, a film and a folder of images, a grey and a transparent one among them: the model's
    scores of what another reader finds in them."""
    path = Path(f"$clip{suffix}")
    pictures = [Image.fromarray(picture).resize((64, 64)) for picture in toy.pictures(0)]
    if suffix:
        imageio.imwrite(path, np.stack(pictures))
        shown = imageio.imread(path)
    else:
        path.mkdir()
        pictures[:2] = [pictures[0].convert("L"), pictures[1].convert("RGBA")]
        for k, picture in enumerate(pictures):  # 10.png comes after 9.png
            picture.save(path / f"{k + 2}.png")
        shown = np.stack([picture.convert("RGB") for picture in pictures])
    sentences = ["open the $_$ drawer 🦾", "push"]
    assert show.main([str(finished), str(path), *sentences]) == 0
    lines = capsys.readouterr().out.splitlines()
    model = vlmrm.load_reward_model(finished)
    for column, sentence in enumerate(sentences):
        rewards = [model.score(picture[None], sentence).item() for picture in shown]
        printed = [float(line.split()[2 + column]) for line in lines[:10]]
        assert printed == pytest.approx(rewards, abs=1e-4)
        voc = vlmrm.value_order_correlation(np.array(rewards))
        assert lines[10 + column].startswith(f"VOC {voc:.2f}") and sentence in lines[10 + column]
    assert lines[12:] == [f"see {(place / path.stem).absolute()}-reward.gif"]

@pytest.mark.parametrize("orientation, turn", [(1, 0), (3, 180), (6, 90), (8, 270)])
def test_a_photo_is_shown_upright(tmp_path, orientation, turn):
    """However the camera was turned: EXIF says so."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    lying = Image.fromarray(PICTURES[0]).rotate(turn, expand=True)
    lying.save(tmp_path / "lying.png", exif=exif)
    [found] = common.read_pictures(tmp_path / "lying.png")
    assert (np.asarray(found) == PICTURES[0]).all()

if features.check("avif"):  # Pillow has it from 11.3 on
    def test_all_pictures_of_an_avif_are_read(tmp_path):
        first, *others = [Image.fromarray(picture) for picture in GROWING]
        first.save(tmp_path / "film.avif", save_all=True, append_images=others)
        found = [np.asarray(picture).mean()
                 for picture in common.read_pictures(tmp_path / "film.avif")]
        assert found == pytest.approx(GROWING.mean(axis=(1, 2, 3)), abs=4)

@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_can_be_seen_through_is_on_white(tmp_path, mode):
    """Black that is more and more solid becomes darker."""
    if mode == "P":
        image = Image.new("P", (4, 4), 0)
        image.save(tmp_path / "clear.png", transparency=0)
        found = common.read_pictures(tmp_path / "clear.png")
        assert [np.asarray(picture).mean() for picture in found] == [255]
        return
    for alpha in (0, 51, 255):
        colour = (0, 0, 0, alpha) if mode == "RGBA" else (0, alpha)
        [found] = [common.to_rgb(Image.new(mode, (4, 4), colour))]
        assert np.asarray(found).shape == (4, 4, 3) and np.unique(found) == [255 - alpha]

def test_a_folder_of_photos(brightness, place, capsys):
    """In the order of their numbers, whatever they end with, each once though it has its thumbnail
    in it, and of any shape: all of each is shown."""
    Path("photos").mkdir()
    for k, suffix in enumerate(("jpeg", "jpg", "png", "mpo")):
        shape = (40, 80) if k % 2 else (80, 40)
        photo = Image.new("RGB", shape, (50 * k, 50 * k, 50 * k))
        more = {"save_all": True, "append_images": [photo]} if suffix == "mpo" else {}
        photo.save(f"photos/{k + 1}.{suffix}", **more)
    for out in ("reward.gif", "reward.mp4"):
        assert show.main(["run", "photos", "push", "--out", out]) == 0
        lines = capsys.readouterr().out.splitlines()
        shown = [float(line.split()[2]) * 9 for line in lines[:4]]
        assert shown == pytest.approx([0, 50, 100, 150], abs=2) and lines[4].startswith("VOC 1.00")
        assert {frame.shape for frame in imageio.imiter(out)} == {(240 + 240, 480, 3)}

@pytest.mark.parametrize("name, content, says", [
    ("clip.mp4", b"", "cannot read"), ("clip.gif", b"GIF89a", "clip.gif"),
    ("clip.mp4", b"no film", "clip.mp4"), ("none.mp4", None, "none.mp4: ValueError: there is no"),
    ("motion.mjpeg", None, "motion.mjpeg: OSError"),
    ("README.md", b"no film", "cannot read"), ("grey.png", None, "its values are not bytes"),
    (os.devnull, None, "there is no such file"), ("empty", None, "has no pictures in it")])
def test_films_that_are_not_shown(place, brightness, capsys, name, content, says):
    """16 bits a pixel among them, and what would keep it waiting or read in part."""
    Path("empty").mkdir()
    Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 999).save("grey.png")
    Image.new("RGB", (8, 8)).save("motion.mjpeg", "JPEG")  # many of these, one after the other
    if content is not None:
        Path(name).write_bytes(content)
    refuses(show.main, ["run", name, "push", "--out", "reward.gif"], capsys, says)
    assert not list(place.glob("*reward*"))

@pytest.mark.parametrize("names, says", [
    ("film.2.png film.10.jpg film.0001.png", None), ("1.png 01.jpg 2.png", None),
    ("0.5.png 1.25.png 1.5.png", "are numbered"), ("1.png last.png", "last.png"),
    ("a1.png b2.png", "mixes pictures called a, b")])
def test_the_order_of_a_folder(names, says, tmp_path):
    """By whole numbers; other names have no order that is sure."""
    for name in names.split():
        (tmp_path / name).touch()
    if says:
        with pytest.raises(vlmrm.InputError, match=says):
            common.in_order(tmp_path)
        return
    found = [file.name for file in common.in_order(tmp_path)]
    assert found == sorted(found, key=lambda name: int(name.split(".")[-2]))
    assert sorted(found) == sorted(names.split())

# -----------------------------------------------------------------------------
# hub.py

def test_a_full_disk_leaves_no_half_a_model(finished, place, monkeypatch, capsys):
    def copy(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copy", copy)
    refuses(hub.main, [finished, "model"], capsys, "No space left")
    assert not Path("model").exists()

def test_a_model_for_others(finished, place):
    """The folder alone scores as the run does; its adapters are in the weights, no path is left."""
    assert hub.main([str(finished), "model"]) == 0
    out = place / "model"
    (out / "try.py").write_text("\n".join((
        "import sys, vlmrm, numpy", "model = vlmrm.load_reward_model('.', 'cpu')",
        "model.low_precision = False", "rewards = model.score(numpy.load(sys.argv[1]), 'push')",
        "print(vlmrm.__file__, *rewards)")))
    np.save("pictures.npy", PICTURES)
    status, printed, error = command(place / "pictures.npy", cwd=out, script="try.py")
    assert status == 0, error
    where, *rewards = printed.split()
    assert Path(where).parent == out
    run = vlmrm.load_reward_model(finished, "cpu")
    run.low_precision = False
    assert np.float64(rewards) == pytest.approx(run.score(PICTURES, "push"), abs=1e-5)
    config = read_kept(out, "config.json")
    assert config["lora"] == 0 and config["cosine"] is True
    assert str(Path(config["data"]).name) == config["data"] == "toy.npz"
    assert "/" not in (out / "config.json").read_text()

def test_the_card_has_the_results(finished, place):
    """Under the own sentence and the opposite one. One of four is found by chance in a quarter."""
    shutil.copytree(finished, "run")
    report = dict(read_kept(finished), sentences=4)
    entry = {"value": -0.123, "tasks": 1, "interval": [-1, 1]}
    report["unseen"] = dict(report["unseen"], voc_opposite=entry)
    Path("run/metrics.json").write_bytes(vlmrm.to_json(report))
    assert hub.main(["run", "model"]) == 0
    card = Path("model/README.md").read_text()
    assert card.startswith("---\nlicense: mit\n") and "\n# model\n" in card
    value = report["seen"]["voc"]["value"]
    assert f"\n| VOC: order of experts' frames | {value:.2f} | " in card
    assert re.search(r"\n\| VOC under the opposite sentence \| .* \| -0.12 \| 0.00 \|\n", card)
    assert re.search(r"its own text \|.*\| 0\.25 \|", card)

@pytest.mark.parametrize("changes", [None, {"seen": None}, {"seen": {"voc": 1}}, {"sentences": 0}])
def test_results_that_make_no_card(finished, place, capsys, changes):
    shutil.copytree(finished, "run")
    Path("run/metrics.json").write_text("{}")
    if changes:
        report = dict(read_kept(finished), **changes)
        Path("run/metrics.json").write_bytes(vlmrm.to_json(report))
    refuses(hub.main, ["run", "model"], capsys, "cannot read run/m")
    assert not Path("model").exists()

# -----------------------------------------------------------------------------
# environment.py

class Grey(gymnasium.Env):
    """Its picture grows lighter by 45 each step, its reward is -1, and it ends after two."""
    observation_space = gymnasium.spaces.Discrete(3)
    action_space = gymnasium.spaces.Discrete(2)
    render_mode = "rgb_array"

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = (options or {}).get("begin", 0)
        return self.steps, {}

    def step(self, action):
        self.steps += 1
        return self.steps, -1.0, self.steps == 2, False, {}

    def render(self):
        return np.full((8, 8, 3), 45 * self.steps, np.uint8)

@pytest.mark.parametrize("options, expected", [
    ({}, [5, 10]), ({"render": lambda: PICTURES[0]}, [PICTURES[0].mean() / 9] * 2),
    ({"shaping": True, "gamma": 0.5}, [-1 + 0.5 * 5 - 0, -1 + 0 - 5])])
def test_the_reward_of_an_environment(brightness, options, expected):
    """In the place of its own, from another view, and as a potential, which is 0 at the end."""
    env = environment.wrap_environment(Grey(), brightness, "go", **options)
    for _ in range(2):  # nothing is left of the episode before
        env.reset()
        rewards = []
        for _ in range(2):
            _, reward, terminated, _, info = env.step(0)
            rewards.append(reward)
            assert info["original_env_rew"] == info["environment_reward"] == -1
        assert rewards == pytest.approx(expected) and terminated
    observation, _ = env.reset(seed=3, options={"begin": 1})
    assert observation == 1

@pytest.mark.parametrize("mode, expected", [("SAME_STEP", [5, 10, 5, 10]),
                                            ("NEXT_STEP", [5, 10, 0, 5])])
@pytest.mark.parametrize("shaping", [False, True])
def test_many_environments(brightness, mode, expected, shaping):
    """An episode's last reward is of its own last picture; a step that only resets has none."""
    if shaping:
        expected = [{5: 4, 10: -6, 0: 0}[reward] for reward in expected]  # -1 + r(s') - r(s)
    def make():
        return environment.wrap_environment(Grey(), brightness, "go", shaping=shaping, gamma=1)
    many = gymnasium.vector.SyncVectorEnv(
        [make] * 3, autoreset_mode=gymnasium.vector.AutoresetMode[mode])
    with pytest.raises(vlmrm.InputError, match="wrap each environment"):
        environment.wrap_environment(many, brightness, "go")
    with pytest.raises(vlmrm.InputError, match="then let Autoreset wrap that"):
        environment.wrap_environment(gymnasium.wrappers.Autoreset(Grey()), brightness, "go")
    many.reset()
    for reward in expected:
        _, rewards, *_ = many.step(np.zeros(3, int))
        assert rewards.tolist() == [reward] * 3

@pytest.mark.parametrize("picture, says", [
    (None, "render_mode"), ([], "render_mode"), ([np.zeros((8, 8, 3), np.uint8)], "render_mode"),
    (np.zeros((8, 8)), "must be uint8"), (np.zeros((8, 8, 4), np.uint8), "must be uint8"),
    (np.zeros((2, 8, 8, 3), np.uint8), "must be uint8"), (np.zeros((8, 8, 3)), "must be uint8")])
def test_what_is_no_picture_has_no_reward(tiny, picture, says):
    with pytest.raises(vlmrm.InputError, match="is no sentence"):
        environment.wrap_environment(Grey(), tiny, " ")
    env = environment.wrap_environment(Grey(), tiny, "go", render=lambda: picture)
    env.reset()
    with pytest.raises(vlmrm.InputError, match=says):
        env.step(0)

if importlib.util.find_spec("stable_baselines3"):  # not among the requirements
    def test_stable_baselines_takes_the_environment(tiny):
        """And learns with it."""
        import stable_baselines3
        from stable_baselines3.common.env_checker import check_env
        env = environment.wrap_environment(Grey(), tiny, "go")
        check_env(env)
        agent = stable_baselines3.PPO("MlpPolicy", env, n_steps=8, batch_size=8)
        agent.learn(16)

@pytest.mark.rendering
def test_shaping_begins_with_a_picture_of_the_start(rendering, tiny):
    """reset() of this task moves the window: after a step that does nothing it is still there."""
    simulator, _, renderer = vlmrm.open_task("window-close-v3", 64)
    pictures = []

    def render():
        pictures.append(vlmrm.draw(renderer, simulator.data, {}).astype(int))
        return pictures[-1].astype(np.uint8)

    env = environment.wrap_environment(simulator, tiny, "go", render=render, shaping=True)
    env.reset()
    env.step(np.zeros(4, np.float32))
    assert np.abs(pictures[1] - pictures[0]).mean() < 1
    renderer.close()
