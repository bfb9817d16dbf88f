"""TCN with the instruction in place of the last frame.

    L = tcn_loss() of (s0, s1, l): (l, s1) against (l, s0) and (l, other l), (s1, s0) as before

Notice: TCN knows no sentence. Here the sentence is the last frame, which late frames come close to.
Where TCN contrasts the ends of videos, this contrasts their sentences.
Source: our own. Uses vlmrm.tcn_loss().
"""
import torch

import vlmrm

TUNED = (2e-3, {"temperature": 0.1})

def loss(frames, texts, times, temperature: float = 1.0):
    frames = torch.cat([frames[:, :-1], texts[:, None]], dim=1)
    return vlmrm.tcn_loss(frames, texts, times, temperature)
