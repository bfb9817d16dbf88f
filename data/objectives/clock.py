"""A control, the time index: the reward is the number of the frame.

    r(o_k) = k

Notice: it sees neither picture nor sentence. On experts it is perfect by definition, and even on
mixed episodes it is hard to beat: what a metric gives a clock is no merit of a model.
Source: our own.
"""
import torch

def reward(frames, text):
    return torch.arange(frames.shape[1]).repeat(len(frames), 1)  # (E, T)
