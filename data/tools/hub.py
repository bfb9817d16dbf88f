"""A run as a model that others can take, in the form of the Hugging Face Hub.

    python data/tools/hub.py runs/triplet-seed0 my-model
    hf upload YOUR_NAME/my-model my-model        of huggingface_hub, which open_clip brings along

my-model/ is all that it takes: model.safetensors (all weights, the adapters added to them),
config.json (without the paths of your machine), README.md (front matter, results) and vlmrm.py.
"""
import common  # first: it knows where vlmrm.py is
import vlmrm

import shutil
from pathlib import Path

from safetensors.torch import save

CARD = """---
license: {licence}
library_name: vlmrm
tags: [robotics, reward-model, vision-language, clip]
---
# {name}

A vision-language reward model: how far along is a robot with what a sentence asks for? The backbone
`{backbone}`, whose licence holds for these weights, trained for the objective `{objective}` on
`{data}` ({way}) with vlmrm.py, which follows arXiv 2512.20675 and is not by its authors.

```python
import sys
from huggingface_hub import snapshot_download

folder = snapshot_download("YOUR_NAME/{name}")
sys.path.insert(0, folder)
import vlmrm  # it takes torch, open_clip_torch, scipy and matplotlib
model = vlmrm.load_reward_model(folder)
rewards = model.score(pictures, "close the drawer")  # pictures uint8 (N, H, W, 3), rewards (N,)
```

Rewards are cosines: only compare pictures under one sentence, of scenes like those it was trained
on. Means over tasks (unseen: nobody trained on them):

{table}
"""

def results_table(report: dict) -> str:
    """The metrics of a run, in Markdown. Those that no task has are left out."""
    rows = [["", "seen tasks", "unseen tasks", "by chance"]]
    for metric, (text, chance) in vlmrm.METRICS.items():
        if metric == "retrieval_top1":
            chance = 1 / report["sentences"]
        cells = [f"{report[group][metric]['value']:.2f}" if metric in report[group] else ""
                 for group in ("seen", "unseen")]
        if any(cells):
            rows.append([text, *cells, f"{chance:.2f}"])
    return common.markdown_table(rows)

def publish(args) -> None:
    """Write the folder. Raises InputError."""
    common.check_outputs(args.out)
    model = vlmrm.load_reward_model(args.run, "cpu")  # its adapters are merged
    weights = {name: weight.contiguous() for name, weight in model.state_dict().items()}
    report = vlmrm.read_json(args.run / "metrics.json")
    with vlmrm.reading(args.run / "metrics.json"):
        table = results_table(report)
    config = vlmrm.read_json(args.run / "config.json")
    with vlmrm.reading(args.run / "config.json"):
        for name in ("objective", "pretrained", "data", "instructions"):
            if config[name]:
                config[name] = Path(config[name]).name
        way = "all weights"
        if config["lora"]:
            way = f"adapters of rank {config['lora']}, which are added to the weights here"
        config["lora"] = 0
        licence = "mit" if config["pretrained"] == "tiny.safetensors" else "other"
        card = CARD.format(
            name=args.out.name, licence=licence, backbone=config["backbone"],
            objective=Path(config["objective"]).stem, data=config["data"], way=way, table=table)
    args.out.mkdir()
    try:
        vlmrm.write_whole(args.out / "model.safetensors", save(weights))
        vlmrm.write_whole(args.out / "config.json", vlmrm.to_json(config))
        vlmrm.write_whole(args.out / "README.md", card.encode())
        shutil.copy(vlmrm.__file__, args.out)
    except BaseException:  # a full disk, say: no half a folder
        shutil.rmtree(args.out)
        raise
    print(f"{args.out} has README.md, config.json, model.safetensors and vlmrm.py")

def main(argv: list[str] = None) -> int:
    parser = common.Parser("hub", description=__doc__)
    parser.add_argument("run", type=Path, help="such as runs/triplet-seed0")
    parser.add_argument("out", type=Path, help="a folder to write")
    return common.main(parser, publish, argv)

if __name__ == "__main__":
    raise SystemExit(main())
