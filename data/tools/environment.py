"""A trained model as the reward of a gymnasium environment. It stays beside vlmrm.py because the
lesson ends where a reward is measured; this is for whoever goes on to train a policy with it.

    import sys, vlmrm; sys.path.append("data")
    from environment import wrap_environment
    env = wrap_environment(env, vlmrm.load_reward_model("runs/triplet-seed0"), "close the drawer")

Mind that what is maximised is exploited: what the model likes without reason will be found.
"""
import numpy as np

import vlmrm

def wrap_environment(env, model, instruction: str, render=None, shaping: bool = False,
                     gamma: float = 0.99):
    """The environment with the model's reward, of the frame after the step, in place of its own.

    render() -> uint8 (H, W, 3); by default env.render(). With shaping the model's reward r is added
    to the environment's own, as gamma r(s') - r(s), r of a terminal state being 0: then the best
    policy stays the best one, whatever the model says, if gamma is the agent's own discount (Ng,
    Harada and Russell, 1999). The environment's own is in info["environment_reward"], and in
    info["original_env_rew"], where the package `imitation` puts it. A vector environment is scored
    in one call, without shaping; render() gives its pictures, one each. Raises InputError for a bad
    sentence or no picture.
    """
    import gymnasium
    model.score(np.zeros((1, 8, 8, 3), np.uint8), instruction)  # refuses a bad sentence now

    def named(info, reward):
        return info | {"environment_reward": reward, "original_env_rew": reward}

    class ManyRewards(gymnasium.vector.VectorWrapper):
        def step(self, actions):
            observations, rewards, terminated, truncated, infos = self.env.step(actions)
            seen = model.score(np.stack((render or self.env.render)()), instruction)
            return observations, seen, terminated, truncated, named(infos, rewards)

    class ModelReward(gymnasium.Wrapper):
        def look(self) -> float:
            if (picture := (render or self.env.render)()) is None:
                raise vlmrm.InputError("the environment renders nothing: make it with "
                                       "render_mode='rgb_array'")
            return float(model.score(picture[None], instruction)[0])

        def reset(self, **options):
            observation, info = self.env.reset(**options)
            self.before = self.look() if shaping else 0.0
            return observation, info

        def step(self, action):
            observation, environment_reward, terminated, truncated, info = self.env.step(action)
            seen = self.look()
            if shaping:
                after = 0.0 if terminated else seen
                seen, self.before = environment_reward + gamma * after - self.before, after
            return observation, seen, terminated, truncated, named(info, environment_reward)

    if isinstance(env, gymnasium.vector.VectorEnv):
        if shaping:
            raise vlmrm.InputError("shaping is for one environment, not for a vector of them")
        return ManyRewards(env)
    return ModelReward(env)
