"""Hop: which share of what remains is done between two frames, or of what was done is undone.

    hop(x; u, v) = (x_v - x_u) / (1 - x_u) if v is later, else (x_v - x_u) / x_u
    L = mean over ordered pairs of (hop(p; u, v) - hop(t; u, v))^2,  p = sigmoid(scale cos(o, l))

Notice: near the end a small step is a large hop, so that the last centimetre counts.
Source: Robo-Dopamine, Tan et al., 2512.23703. Differs: there a large VLM names the hop of two
frames in words. Here it is made of two cosines; the sigmoid and the scale are ours, and so is that
times and progress are squeezed into .05 to .95, as from 0 and 1 a hop is not defined. Uses
vlmrm.cosine().
"""
import torch

import vlmrm

TUNED = (2e-3, {"scale": 10.0})

def hop(x, u, v, later):
    """x (B, K), progress between 0 and 1; u, v (P,) frames; later (B, P) -> (B, P)."""
    change = x[:, v] - x[:, u]
    return change / torch.where(later, 1 - x[:, u], x[:, u])

def loss(frames, texts, times, scale: float = 10.0):
    u, v = (~torch.eye(frames.shape[1], dtype=torch.bool)).nonzero().T  # all 20 ordered pairs
    progress = torch.sigmoid(scale * vlmrm.cosine(frames, texts[:, None]))  # (B, K)
    done = 0.05 + 0.9 * progress
    due = 0.05 + 0.9 * times
    later = due[:, v] > due[:, u]
    return (hop(done, u, v, later) - hop(due, u, v, later)).square().mean()
