"""A run as a model that others can take, in the form of the Hugging Face Hub. It stays beside
vlmrm.py because the lesson publishes nothing.

    python data/hub.py runs/triplet-seed0 my-model
    hf upload YOUR_NAME/my-model my-model        of huggingface_hub, which open_clip brings along

my-model/ is all that it takes: model.safetensors (all weights, the adapters added to them),
config.json (without the paths of your machine), README.md (front matter, results) and vlmrm.py.
"""
import argparse
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import vlmrm  # before torch: see there

from safetensors.torch import save
from torch.nn.utils import parametrize

CARD = """---
license: {licence}
library_name: vlmrm
tags: [robotics, reward-model, vision-language, clip]
---
# {name}

A vision-language reward model: how far along is a robot with what a sentence asks for? The backbone
`{backbone}`, whose licence holds for these weights, trained for the objective `{objective}` on the
episodes of `{data}` with vlmrm.py, which follows *Revisiting the learning objectives of
vision-language reward models* (arXiv 2512.20675) and is not by its authors.

```python
import sys
from huggingface_hub import snapshot_download

sys.path.insert(0, folder := snapshot_download("YOUR_NAME/{name}"))
import vlmrm  # it takes torch, open_clip_torch, scipy, matplotlib and imageio

model = vlmrm.load_reward_model(folder)
rewards = model.score(frames, "close the drawer")  # frames uint8 (N, H, W, 3), rewards (N,)
```

Rewards are cosines: only compare frames under one sentence, of scenes like those it was trained on.
Means over tasks:

| | seen tasks | unseen tasks | by chance |
| --- | --- | --- | --- |
{table}
"""

def merge_adapters(model) -> dict:
    """All weights of a model, as one without adapters has them: which it then is, in place."""
    for module in list(model.modules()):
        for name in list(getattr(module, "parametrizations", {})):
            parametrize.remove_parametrizations(module, name)  # leaves W + B A in the place of W
    return {name: weight.cpu().contiguous() for name, weight in model.state_dict().items()}

def publish(run: Path, out: Path) -> None:
    """Write the folder. Raises InputError."""
    vlmrm.check_cosine(run)
    config, report = (vlmrm.read_json(run / name) for name in ("config.json", "metrics.json"))
    weights = merge_adapters(vlmrm.load_reward_model(run, "cpu"))
    out.mkdir(parents=True)  # it exists: say so before anything is written
    for name in ("objective", "pretrained", "data", "instructions"):
        config[name] = config[name] and Path(config[name]).name
    ours = config["backbone"] in ("tiny", "thumbnail")
    chances = {"retrieval_top1": 1 / report.get("sentences", 50)}  # the others do not depend on it
    rows = [[text, *(f"{report[group][metric]['value']:.2f}" if metric in report[group] else ""
                     for group in ("seen", "unseen")), f"{chances.get(metric, chance):.2f}"]
            for metric, (text, chance) in vlmrm.METRICS.items()]
    vlmrm.write_whole(out / "model.safetensors", save(weights))
    vlmrm.write_whole(out / "config.json", config | {"lora": 0})
    vlmrm.write_whole(out / "README.md", CARD.format(
        name=out.name, backbone=config["backbone"], objective=Path(config["objective"]).stem,
        data=config["data"], licence="mit" if ours else "other",
        table="\n".join(f"| {' | '.join(row)} |" for row in rows if any(row[1:3]))).encode())
    shutil.copy(vlmrm.__file__, out / "vlmrm.py")

def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="such as runs/triplet-seed0")
    parser.add_argument("out", type=Path, help="a folder to write")
    args = parser.parse_args()
    try:
        publish(args.run, args.out)
    except (vlmrm.InputError, OSError) as problem:
        print("hub:", problem, file=sys.stderr)
        return 2
    print(f"{args.out} has README.md, config.json, model.safetensors and vlmrm.py")
    return 0

if __name__ == "__main__":
    sys.exit(main())
