"""SQuAD as generation: the question from passage and answer, or the answer from passage and question."""

from gpt_jax.errors import choose
from gpt_jax.tasks.base import SpanQA, Split, Task, TextToText
from gpt_jax.tasks.readers import BadRow, Row, make
from gpt_jax.tasks.squad import TEST, TRAIN
from gpt_jax.tasks.squad import task as squad

# what to generate -> template of the source, metrics
MODES = {
    "question": ("{context}\nAnswer: {answer}\nQuestion:\n", ("bleu", "rougeL", "distinct_2")),
    "answer": ("{context}\nQuestion: {question}\nAnswer:\n", ("exact_match", "f1")),
}


def task(
    generate: str = "question",
    train: str = TRAIN,
    valid: str = "",
    test: str = TEST,
    template: str = "",
    hold_out: float = 0.05,
) -> Task:
    """The splits are those of `squad`, question by question.

    Args:
      generate: 'question' (its answer is the first one given) or 'answer' (every given answer is a reference).
      template: of the source, from {context}, {question} and {answer}; '' is that of MODES.
    """
    default, metrics = MODES[choose("task squad_generate: generate", generate, MODES)]
    template = template or default

    def build(item: SpanQA) -> TextToText:
        if problem := item.problem(()):
            raise BadRow(problem)
        columns = {"context": item.context, "question": item.question, "answer": item.gold[0]}
        source = Row(item.where, columns).fill(template)
        if generate == "question":
            return TextToText(source, item.question, where=item.where)
        return TextToText(source, item.gold[0], tuple(dict.fromkeys(item.gold)), where=item.where)

    def read(split: Split) -> Split:
        return lambda: make(split(), build)

    # Held out by the passage, as `squad` does it.
    splits = squad(train, valid, test, hold_out).splits
    return Task(
        name=f"squad_generate_{generate}",
        kind="text_to_text",
        metrics=metrics,
        splits={name: read(split) for name, split in splits.items()},
    )
