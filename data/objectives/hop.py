"""Hop: which share of what remains is done between two frames, or of what was done is undone.

    hop(x; u, v) = (x_v - x_u) / (1 - x_u) if v is later, else (x_v - x_u) / x_u
    L = mean over ordered pairs of (hop(p; u, v) - hop(t; u, v))^2,  p = sigmoid(scale cos(o, l))

Notice: near the end a small step is a large hop, so that the last centimetre counts.
Source: Robo-Dopamine, Tan et al., 2512.23703. Differs: there a large VLM names the hop of two
frames in words. Here it is made of two cosines; the sigmoid and the scale are ours, and so is that
times and progress are squeezed into .05 to .95, as from 0 and 1 a hop is not defined. Uses
vlmrm.anchored_loss(), of which it is the first term.
"""
import vlmrm

TUNED = (2e-3, {"scale": (10.0, 5.0, 20.0)})

def loss(frames, texts, times, scale: float = 10.0):
    return vlmrm.anchored_loss(  # without its anchor
        frames, texts, times, (frames, texts), scale, keep=0, directions=0)
