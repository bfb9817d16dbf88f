"""Preference with the simulator as the judge: of two frames it says which is better.

    L = mean over pairs of -log sigmoid(scale (cos(better, l) - cos(worse, l)))

Notice: LABELS = "rewards" makes the training loop hand over the simulator's rewards as times. No
other objective sees them, so this is no rival of theirs: it shows what better labels are worth.
Source: RL-VLM-F, Wang et al., 2402.03681, where a VLM is the judge. Uses the loss of preference.py.
"""
import runpy
from pathlib import Path

TUNED = (2e-3, {"scale": 20.0})
LABELS = "rewards"
loss = runpy.run_path(str(Path(__file__).with_name("preference.py")))["loss"]
