"""DPO: its value at the reference, its optimum in closed form, and that nothing but the answers counts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from bandit import ARMS, EOT, REWARDS, Table, params_of, policy_of, tilted, total_variation
from helpers import apply_of, tiny
from training import train

from gpt_jax.cli import main
from gpt_jax.data.formats import TaskInfo
from gpt_jax.data.task_rows import EncodedTask
from gpt_jax.data.tokenizer import ByteTokenizer
from gpt_jax.errors import UserError
from gpt_jax.model import Transformer
from gpt_jax.objectives.dpo import DPO, PairRows
from gpt_jax.tasks import Preference, Task, load_task
from gpt_jax.testing import check_objective

TOKENIZER = ByteTokenizer(["eot"])
CONFIG = tiny(vocab_size=257, max_positions=24)
PAIRS = [("ab", "cd", "c"), ("x", "yes", "no!"), ("why", "so", "because"), ("q", "a", "bc")]


def rows(pairs=PAIRS, length=16):
    examples = [Preference(*pair) for pair in pairs]
    task = Task("toy", "preference", ("accuracy",), {"train": lambda: examples})
    encoded = EncodedTask(task, TaskInfo(0, "toy"), examples, PairRows(TOKENIZER.eot, length), TOKENIZER, length)
    return encoded.build(np.zeros(len(pairs), np.int64), np.arange(len(pairs)))


def batch_of(count=8, length=16):
    batch = rows((PAIRS * count)[:count], length)
    batch.pop("task")
    return batch


def keys(n):
    return jax.random.split(jax.random.key(0), n)


def evaluated(objective, params, batch):
    prepared = objective.prepare(batch, keys(len(batch["tokens"])), 0)
    sums, metrics = objective.loss(params, prepared, keys(len(batch["tokens"])), False)
    weight = jnp.sum(prepared["weights"]["dpo"])
    return float(sums["dpo"] / weight), {name: float(a / b) for name, (a, b) in metrics.items()}


def noisy(params, seed=1):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), params)


def model_params():
    from helpers import params_of as of_transformer

    return of_transformer(CONFIG)


def test_at_the_reference_the_loss_is_ln_2():
    params = {"model": model_params(), "reference": model_params()}
    loss, metrics = evaluated(DPO(Transformer(CONFIG), beta=0.3), params, batch_of())
    assert loss == pytest.approx(np.log(2), abs=1e-6)
    assert metrics["margin"] == pytest.approx(0, abs=1e-6)


def test_a_tie_is_not_a_right_answer():
    objective, batch = DPO(Transformer(CONFIG), beta=0.3), batch_of()
    same = {"model": model_params(), "reference": model_params()}
    assert evaluated(objective, same, batch)[1]["accuracy"] == 0
    assert set(np.asarray(objective.predict(same, batch)["answer"])) == {1}
    moved = {"model": noisy(model_params()), "reference": model_params()}
    right = np.mean(np.asarray(objective.predict(moved, batch)["answer"]) == 0)
    assert 0 < right < 1 and evaluated(objective, moved, batch)[1]["accuracy"] == pytest.approx(right)


def test_the_loss_is_that_of_the_answers_log_probabilities_one_token_after_another():
    params = {"model": noisy(model_params()), "reference": model_params()}
    model = Transformer(CONFIG)

    def log_p(root, prompt, answer):
        ids = [TOKENIZER.eot, *prompt.encode(), *answer.encode(), TOKENIZER.eot]
        padded = np.array([ids[:-1] + [0] * (16 - len(ids))], np.int32)  # what comes after is not seen
        logits = np.asarray(apply_of(CONFIG)(params[root], padded).logits[0], np.float64)
        table = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return sum(table[t, ids[t + 1]] for t in range(len(prompt), len(ids) - 1))

    margins = []
    for prompt, chosen, rejected in PAIRS:
        ratios = [log_p("model", prompt, a) - log_p("reference", prompt, a) for a in (chosen, rejected)]
        margins.append(0.3 * (ratios[0] - ratios[1]))
    batch = batch_of(len(PAIRS))
    loss, metrics = evaluated(DPO(model, beta=0.3), params, batch)
    assert loss == pytest.approx(np.mean([np.log1p(np.exp(-m)) for m in margins]), rel=1e-4)
    assert metrics["margin"] == pytest.approx(np.mean(margins), rel=1e-3)
    assert metrics["accuracy"] == np.mean(np.array(margins) > 0)
    smoothed, _ = evaluated(DPO(model, beta=0.3, label_smoothing=0.2), params, batch)
    expected = np.mean([0.8 * np.log1p(np.exp(-m)) + 0.2 * np.log1p(np.exp(m)) for m in margins])
    assert smoothed == pytest.approx(expected, rel=1e-4)


def test_bradley_terry_labels_lead_to_the_tilted_reference():
    """All 30 ordered pairs of arms, each weighted by the probability of its label: the least loss is at pi*."""
    beta = 0.3
    pairs = [(a, b) for a in range(ARMS) for b in range(ARMS) if a != b]
    chance = np.array([1 / (1 + np.exp(REWARDS[b] - REWARDS[a])) for a, b in pairs], np.float32)
    arms = np.array(pairs, np.int32)[:, :, None]
    batch = {
        "tokens": np.full_like(arms, EOT),
        "targets": arms,
        "answer_weights": np.ones(arms.shape, np.float32),
        "segment_ids": np.ones_like(arms),
        "positions": np.zeros_like(arms),
        "row_weights": chance,
    }
    objective, optimizer = DPO(Table(), beta=beta), optax.adam(optax.cosine_decay_schedule(0.05, 2000))
    params = params_of()

    def value(trained):
        sums, _ = objective.loss({**params, "model": trained}, objective.prepare(batch, keys(30), 0), keys(30), True)
        return sums["dpo"] / chance.sum()

    def update(carry, _):
        trained, state = carry
        updates, state = optimizer.update(jax.grad(value)(trained), state)
        return (optax.apply_updates(trained, updates), state), None

    start = (params["model"], optimizer.init(params["model"]))
    trained = jax.jit(lambda c: jax.lax.scan(update, c, None, length=2000)[0])(start)[0]
    assert total_variation(policy_of({"model": trained}), tilted(beta)) < 1e-4
    assert total_variation(policy_of(params), tilted(beta)) > 0.3  # or there was nothing to learn


def test_nothing_flows_into_prompts_or_padding():
    batch = batch_of()
    shape = (*batch["tokens"].shape, CONFIG.vocab_size)

    class Free:
        """Its parameters are the logits of every place."""

        config = CONFIG

        def apply(self, params, tokens, **kwargs):
            return tokens if kwargs["method"] == "unembed" else (params["params"], None)

    def value(logits):
        params = {"model": logits.reshape(-1, *shape[2:]), "reference": jnp.zeros(shape).reshape(-1, *shape[2:])}
        return objective.loss(params, objective.prepare(batch, keys(8), 0), keys(8), True)[0]["dpo"]

    objective = DPO(Free())
    gradient = np.asarray(jax.grad(value)(jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)))
    answers = batch["answer_weights"] > 0
    assert (gradient[~answers] == 0).all() and (np.abs(gradient[answers]).max(-1) > 0).all()


def test_answers_of_both_sides_end_with_eot_and_keep_the_same_prompt():
    batch = rows([("a" * 40, "b", "c" * 60), ("a" * 3, "b", "cc")], length=16)
    eot = TOKENIZER.eot
    first = batch["answer_weights"].argmax(-1)
    assert (first[:, 0] == first[:, 1]).all()
    assert batch["targets"][1, 0, 3:5].tolist() == [ord("b"), eot]
    assert batch["tokens"][0, :, 0].tolist() == [eot, eot] and (batch["answer_weights"][0].sum(-1) > 0).all()


def test_it_keeps_the_contract():
    found = check_objective(DPO(Transformer(CONFIG)), batch_of())
    assert not [name for name in found.without_gradient if name.startswith("model/")]


def test_training_moves_the_policy_and_not_the_reference():
    objective = DPO(Transformer(CONFIG))
    state, metrics = train(objective, [batch_of()] * 12, rate=3e-3)
    assert metrics[0]["loss"] == pytest.approx(np.log(2), abs=1e-6) and metrics[-1]["loss"] < 0.6
    start = jax.device_get(train(objective, [batch_of()])[0].frozen["reference"])
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.frozen["reference"]), start)


def test_the_embedded_pairs_are_spoilt_docstrings():
    task = load_task({"name": "python_preferences", "size": 200})
    train_, valid = task.examples("train"), task.examples("valid")
    assert len(train_) > 100 and not {e.prompt for e in train_} & {e.prompt for e in valid}
    assert all(e.chosen != e.rejected and e.chosen.strip() and e.rejected.strip() for e in train_)
    assert task.examples("train") == train_


def test_pairs_of_ones_own_are_a_table(tmp_path):
    path = tmp_path / "pairs.tsv"
    path.write_text("q\tgood\tbad\n1 + 1?\t2\t3\nsame?\tyes\tyes\n")
    columns = {"prompt": "Q: {q}", "chosen": "{good}", "rejected": "{bad}"}
    spec = {"name": "preferences", "train": str(path), "hold_out": 0, **columns}
    assert load_task(spec, malformed="skip").examples("train") == [Preference("Q: 1 + 1?", "2", "3", where=f"{path}:2")]
    with pytest.raises(UserError, match="pairs.tsv:3: the chosen and the rejected answer are the same"):
        load_task(spec).examples("train")


def test_mistakes_are_named(tmp_path, capsys):
    with pytest.raises(UserError, match="beta is 0"):
        DPO(Table(), beta=0)
    flags = ["--config.data.tokenizer.kind=byte", "--config.data.tasks=python_kinds"]
    assert main(["train", "--config=dpo", f"--workdir={tmp_path}", *flags]) == 1
    assert "takes 'preference'" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_starts_both_roots_from_anothers_weights(tmp_path):
    from gpt_jax.checkpoint_parts import load_params

    small = [
        *("--config.model.num_layers=1", "--config.model.d_model=32", "--config.steps=2", "--config.batch_size=8"),
        *("--config.context_length=64", "--config.data.tokenizer.kind=byte", "--config.log.tensorboard=False"),
        *("--config.eval.max_batches=1", "--config.sample.prompts=()"),
    ]
    assert main(["train", "--config=causal_lm", f"--workdir={tmp_path / 'base'}", *small]) == 0
    given = f"--config.init.from={tmp_path / 'base'}"
    assert main(["train", "--config=dpo", f"--workdir={tmp_path / 'dpo'}", *small, given]) == 0
    base = load_params(tmp_path / "base" / "checkpoints")["model"]
    jax.tree.map(np.testing.assert_array_equal, load_params(tmp_path / "dpo" / "checkpoints")["reference"], base)
