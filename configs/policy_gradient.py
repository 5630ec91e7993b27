"""Policy gradient on made-up sums: two-digit addition in GPT-3's format, closeness to the answer rewarded.

`init.from` names the supervised run to start from (configs/rl/addition_supervised): a policy that never finds a right
answer learns nothing from rewards. Without it, the edit distance to the answer teaches a little from scratch."""

from gpt_jax.config import base


def get_config():
    config = base()
    config.steps = 200
    config.batch_size = 64
    config.context_length = 48
    config.model.update(num_layers=2, d_model=128, num_heads=4)
    config.objective = dict(
        name="policy_gradient",
        algorithm="reinforce",
        beta=0.01,
        rewards=("edit_distance", dict(name="exact_match", weight=0.0)),
        rollout_every=2,
        group=8,
        max_new=6,
    )
    config.data.tasks = ("synthetic_arithmetic",)
    config.data.tokenizer.kind = "byte"
    config.optimizer.update(learning_rate=3e-4, warmup="5", weight_decay=0.0, b2=0.99)
    config.eval.update(every_steps=50, max_generated=200)
    config.checkpoint.every_steps = 100
    config.sample.prompts = ()
    return config
