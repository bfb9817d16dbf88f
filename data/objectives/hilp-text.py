"""HILP with the instruction in place of the last frame.

    V(o; l) = -scale |o - l|;  L = expectile_loss(V) over the goals o', later, l, and another l'

Notice: the distance to a sentence is fitted to a count of steps, and another video's sentence is
never reached.
Source: our own. Uses the loss of hilp.py.
"""
import runpy
from pathlib import Path

import torch

TUNED = (5e-4, {"scale": 5.0})
hilp_loss = runpy.run_path(str(Path(__file__).with_name("hilp.py")))["loss"]

def loss(frames, texts, times, scale: float = 1.0):
    frames = torch.cat([frames[:, :-1], texts[:, None]], dim=1)
    return hilp_loss(frames, texts, times, scale)
