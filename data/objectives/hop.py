"""Hop: which share of what remains is done between two frames, or of what was done is undone.

    hop(x; u, v) = (x_v - x_u) / (1 - x_u) if v is later, else (x_v - x_u) / x_u
    L = mean over ordered pairs of (hop(p; u, v) - hop(t; u, v))^2,  p = sigmoid(scale cos(o, l))

Notice: near the end a small step is a large hop, so that the last centimetre counts.
Source: Robo-Dopamine, Tan et al., 2512.23703. Differs: there a large VLM names the hop of two
frames in words. Here it is made of two cosines; the sigmoid and the scale are ours, and the times
are kept from 0 and 1, where a hop is not defined. Uses vlmrm.cosine().
"""
import torch

import vlmrm

TUNED = (2e-3, {"scale": (5.0, 10.0, 20.0)})

def loss(frames, texts, times, scale: float = 10.0):
    progress = torch.sigmoid(scale * vlmrm.cosine(frames, texts[:, None])), times
    u, v = (~torch.eye(frames.shape[1], dtype=torch.bool)).nonzero().T  # ordered pairs
    done, due = (x.clamp(0.05, 0.95) for x in progress)  # (B, K)
    forward = due[:, v] > due[:, u]  # (B, P)
    hops = [(x[:, v] - x[:, u]) / torch.where(forward, 1 - x[:, u], x[:, u]) for x in (done, due)]
    return (hops[0] - hops[1]).square().mean()
