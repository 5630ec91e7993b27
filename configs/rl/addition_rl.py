"""Policy gradient on two-digit addition: `init.from` names a run of addition_supervised.

The right sum is rewarded; edit distance and format are only logged. Validation is greedy exact match on sums that are
not trained on."""

from gpt_jax.config import base


def get_config():
    config = base()
    config.steps = 240
    config.batch_size = 128
    config.context_length = 40
    config.model.update(num_layers=3, d_model=128, num_heads=4)
    config.model.update(norm="rmsnorm", ffn="relu2", qk_norm=True, bias=False)
    config.objective = dict(
        name="policy_gradient",
        algorithm="reinforce",
        beta=0.005,
        rewards=(
            "exact_match",
            dict(name="edit_distance", weight=0.0),
            {"name": "format", "pattern": r" \d+", "weight": 0.0},
        ),
        rollout_every=2,
        group=8,
        max_new=6,
        generate_rows=256,
    )
    config.data.tasks = ("synthetic_arithmetic",)
    config.data.tokenizer.kind = "byte"
    config.optimizer.update(learning_rate=3e-4, warmup="10", weight_decay=0.0, b2=0.99)
    config.eval.update(every_steps=60, max_generated=200)
    config.checkpoint.every_steps = 120
    config.sample.prompts = ()
    return config
