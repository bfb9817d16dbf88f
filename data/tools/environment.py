"""A trained model as the reward of a gymnasium environment, to train a policy with it.

    import vlmrm
    from data.tools.environment import wrap_environment  # in the folder of vlmrm.py
    model = vlmrm.load_reward_model("runs/triplet-seed0")
    env = wrap_environment(env, model, "close the drawer")

Mind that what is maximised is exploited: what the model likes without reason will be found. For
many environments wrap each: gymnasium.vector.SyncVectorEnv([lambda: wrap_environment(...), ...]) is
right in all autoreset modes. AsyncVectorEnv needs context="spawn": a process that begins as a copy
of this one, with a model or a renderer in it, hangs.
"""
import vlmrm

import gymnasium
import numpy as np

def pose(simulator) -> None:
    """Meta-World's reset() moves things, and leaves the poses that are drawn where they were."""
    if type(getattr(simulator, "data", None)).__name__ == "MjData":
        import mujoco
        mujoco.mj_forward(simulator.model, simulator.data)

def wrap_environment(env, model, instruction: str, render=None, shaping: bool = False,
                     gamma: float = 0.99) -> gymnasium.Wrapper:
    """The environment with the model's reward, of the picture after the step, in place of its own.

    render() -> uint8 (H, W, 3); by default env.render(). With shaping the model's reward r is added
    to the environment's own, as gamma r(s') - r(s), r of a terminal state being 0: then the best
    policy stays the best one, whatever the model says, if gamma is the agent's own discount (Ng,
    Harada and Russell, 1999). The environment's own is in info["environment_reward"], and in
    info["original_env_rew"], where the package `imitation` puts it. Raises InputError for a bad
    sentence or, at a step, for no picture.
    """
    model.check_sentence(instruction)
    if isinstance(env, gymnasium.vector.VectorEnv):
        raise vlmrm.InputError("wrap each environment, then make a vector of them")
    if "<Autoreset<" in str(env):  # its step after the end is a reset, which has no reward
        raise vlmrm.InputError("wrap the environment first, then let Autoreset wrap that")
    render = render or env.render

    def look() -> float:
        picture = render()
        if not isinstance(picture, np.ndarray):
            raise vlmrm.InputError(f"it renders {type(picture).__name__}, no array (H, W, 3): make "
                                   "the environment with render_mode='rgb_array'")
        return model.score(picture[None], instruction).item()

    class ModelReward(gymnasium.Wrapper):
        def reset(self, **kwargs):
            observation, info = self.env.reset(**kwargs)
            if shaping:
                pose(self.env.unwrapped)
                self.before = look()
            return observation, info

        def step(self, action):
            observation, own_reward, terminated, truncated, info = self.env.step(action)
            reward = look()
            if shaping:
                after = 0.0 if terminated else reward
                reward = own_reward + gamma * after - self.before
                self.before = after
            info = dict(info, environment_reward=own_reward, original_env_rew=own_reward)
            return observation, reward, terminated, truncated, info

    return ModelReward(env)
