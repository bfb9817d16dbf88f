"""VIP with the instruction in place of the goal image.

    L = implicit_value_loss(V) + l1 |x|_1 + l2 |x|_2,  V(o; l) = -scale |o - l|

Notice: the value counts the steps to a sentence. LIV has this term too, but its authors weigh it
with 0.
Source: our own. Uses vlmrm.vip_loss().
"""
import torch

import vlmrm

TUNED = (2e-3, {"scale": 5.0})

def loss(frames, texts, times, scale: float = 1.0):
    frames = torch.cat([frames[:, :-1], texts[:, None]], dim=1)
    return vlmrm.vip_loss(frames, texts, times, scale)
