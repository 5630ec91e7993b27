"""Reading a config.json strictly: a field is mapped, of no consequence, or refused by name."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from gpt_jax.errors import UserError, choose

# Of every family: names, versions, how weights are stored, initialised or regularised, how text is generated. None of
# them changes the function that the weights compute.
_BOOKKEEPING = frozenset(
    (
        *("architectures", "model_type", "auto_map", "name_or_path", "transformers_version", "torch_dtype", "dtype"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "decoder_start_token_id"),
        *("forced_bos_token_id", "forced_eos_token_id", "use_cache", "initializer_range", "return_dict"),
        *("output_attentions", "output_hidden_states", "output_scores", "return_dict_in_generate", "torchscript"),
        *("use_bfloat16", "tf_legacy_loss", "problem_type", "finetuning_task", "id2label", "label2id"),
        *("task_specific_params", "tokenizer_class", "prefix", "max_length", "min_length", "do_sample"),
        *("early_stopping", "num_beams", "num_beam_groups", "diversity_penalty", "temperature", "top_k"),
        *("top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size"),
        *("encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "remove_invalid_values"),
        *("suppress_tokens", "begin_suppress_tokens", "exponential_decay_length_penalty", "chunk_size_feed_forward"),
        *("pretraining_tp", "attention_dropout"),
    )
)


class Fields:
    """The fields of a config.json; what is taken is remembered, so that the rest can be refused.

    Args:
      tree: the file's content. ignored: fields of the family that are of no consequence.
    """

    def __init__(self, tree: Mapping[str, Any], ignored: Collection[str] = ()) -> None:
        self.tree = dict(tree)
        self._taken = set(_BOOKKEEPING) | set(ignored)

    def take(self, name: str, kind: type | tuple[type, ...], default: Any = ...) -> Any:
        """Returns a field; raises UserError if it is of another type, or missing without a default."""
        self._taken.add(name)
        value = self.tree.get(name)
        if value is None:
            if default is ...:
                raise UserError(f"config.json has no {name!r}.")
            return default
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise UserError(f"config.json has {name}={value!r}, which is no {kinds[0].__name__}.")
        return value

    def number(self, name: str, default: Any = ...) -> float:
        return float(self.take(name, (float, int), default))

    def need(self, name: str, *allowed: Any) -> None:
        """Raises UserError, naming the field, unless it is absent or has one of these values."""
        self._taken.add(name)
        value = self.tree.get(name)
        if value is not None and value not in allowed:
            shown = ", ".join(map(repr, allowed))
            raise UserError(f"config.json has {name}={value!r}, which is not supported; allowed: {shown}.")

    def choose(self, name: str, allowed: Mapping[str, str], default: str) -> str:
        return allowed[choose(f"{name} in config.json", self.take(name, str, default), allowed)]

    def finish(self) -> None:
        """Raises UserError naming the first field that nobody took and that says something."""
        for name, value in self.tree.items():
            if name not in self._taken and value is not None and not name.startswith("_"):
                raise UserError(f"config.json has {name}={value!r}, a field that is not supported.")
