"""A policy that is a table of logits, in the place of a Transformer: exact optima and fast steps."""

import types

import jax
import jax.numpy as jnp
import numpy as np

ARMS = 6
EOT = ARMS  # the one prompt
REWARDS = np.array([0.0, 0.1, 0.25, 0.4, 0.7, 1.0])
REFERENCE = np.array([0.3, 0.25, 0.2, 0.1, 0.1, 0.05])


class Table:
    """Logits of the next token by position and the token before: params {"logits": [T, V + 1, V]}."""

    def __init__(self, vocab_size=ARMS, length=1):
        self.config = types.SimpleNamespace(vocab_size=vocab_size, max_positions=length)

    def init(self, key, tokens):
        V, T = self.config.vocab_size, self.config.max_positions
        return {"params": {"logits": jnp.zeros((T, V + 1, V))}}

    def apply(self, params, tokens, *, mask=None, positions=None, keys=None, method=None):
        if method == "unembed":
            return tokens  # they are the logits already
        T = tokens.shape[1]
        return params["params"]["logits"][jnp.arange(T)[None, :], tokens], None


def softmax(x):
    e = np.exp(x - np.max(x))
    return e / e.sum()


def tilted(beta, reference=REFERENCE, rewards=REWARDS):
    """pi* ~ pi_ref e^{r / beta}: the best of E[r] - beta KL(pi || pi_ref)."""
    return softmax(np.log(reference) + rewards / beta)


def forward_kl_optimum(beta, reference=REFERENCE, rewards=REWARDS):
    """pi = beta pi_ref / (lambda - r): the best of E[r] - beta KL(pi_ref || pi); lambda by bisection."""
    low, high = rewards.max() + 1e-12, rewards.max() + beta + 10.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if (beta * reference / (middle - rewards)).sum() > 1 else (low, middle)
    return beta * reference / (low - rewards)


def with_std(optimum, beta):
    """The fixed point of pi = optimum(beta std_pi(r)): what dividing the advantage by the std does."""
    pi = REFERENCE
    for _ in range(2000):
        std = np.sqrt(np.sum(pi * REWARDS**2) - np.sum(pi * REWARDS) ** 2) + 1e-4
        pi = 0.9 * pi + 0.1 * optimum(beta * std)
    return pi


def total_variation(p, q):
    return 0.5 * np.abs(np.asarray(p) - np.asarray(q)).sum()


def params_of(reference=REFERENCE, policy=None):
    """Both roots; the policy begins at the reference."""

    def table(p):
        return {"logits": jnp.broadcast_to(jnp.log(jnp.asarray(p, jnp.float32)), (1, ARMS + 1, ARMS))}

    return {"model": table(reference if policy is None else policy), "reference": table(reference)}


def policy_of(params):
    return np.asarray(jax.nn.softmax(params["model"]["logits"][0, EOT]))
