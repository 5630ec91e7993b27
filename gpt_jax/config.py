"""Configuration: an ml_collections file and command-line overrides become frozen dataclasses, strictly.

A config file defines `get_config()` and states only what differs from `base()`:

    from gpt_jax.config import base

    def get_config():
        config = base()
        config.steps = 2000
        config.model.num_layers = 4
        return config

The dataclasses below are the base config: every key, its default and, in its metadata, one line of meaning
(`gpt-jax train --print-config`). An unknown key is an error that names the closest one.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import json
import pathlib
import re
import traceback
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from gpt_jax.config_ranges import LAYOUTS, check_ranges
from gpt_jax.errors import UserError, nearest
from gpt_jax.model.config import ModelConfig
from gpt_jax.options import option


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    kind: str = option("unigram", "unigram | bpe (sentencepiece), char, byte, gpt2 or hf (files at `path`)")
    path: str = option("", "an existing tokenizer: its folder or file; empty trains one from the corpus")
    vocab_size: int = option(4096, "size to train, specials included (unigram, bpe); char: the k most frequent, 0 all")
    specials: tuple[str, ...] = option(("eot", "mask", "sep", "cls"), "special tokens, after the ordinary ones")
    unknown: str = option("bytes", "what is outside a truncated vocabulary becomes: bytes | unk | error (char only)")
    keep: int = option(0, "unigram, bpe, gpt2, hf: keep only the k most frequent tokens; 0 keeps all")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    corpus: str = option("python_docs", "embedded corpus (python_docs | python_source), 'files', or 'hf:NAME'")
    path: str = option("", "files or globs of your own text, comma-separated; $VARS are expanded; overrides corpus")
    valid_path: str = option("", "files of validation text; empty holds out `valid_fraction` of the documents")
    valid_fraction: float = option(0.05, "part held out for validation")
    split: str = option("document", "document: hold out whole documents by hash | tail: the end of the text")
    text_key: str = option("text", "column or field that holds the text in jsonl, csv, tsv and parquet files")
    sources: tuple[Mapping[str, Any], ...] = option(
        (), "a weighted mixture: ({'name': ..., 'weight': 60, 'path' or 'corpus': ...}, ...); overrides corpus, path"
    )
    tasks: tuple[Any, ...] = option(
        (), "for objectives that train on tasks: names, import paths or {'name': ..., options} (gpt_jax/tasks)"
    )
    task_rates: str = option("proportional", "several tasks are drawn: proportional (to their examples) | equal")
    task_temperature: float = option(1.0, "proportional rates are raised to 1 / temperature (T5)")
    task_cap: int = option(2**19, "and no task counts for more examples than this")
    valid_split: str = option("valid", "split of the tasks that is evaluated: valid | test")
    layout: str = option("packed", " | ".join(f"{name}: {what}" for name, what in LAYOUTS.items()))
    doc_mask: bool = option(False, "cut attention, positions and targets at document boundaries (GPT-3: False)")
    skip: tuple[tuple[int, int], ...] = option((), "ranges of batch indices to jump over, [(from, to), ...)")
    seed: int = option(-1, "seed of the data order; -1 uses the run's seed")
    prefetch: int = option(2, "batches prepared ahead, on the device")
    workers: int = option(0, "processes that tokenize; 0 uses every core")
    tokenizer: TokenizerConfig = dataclasses.field(default_factory=TokenizerConfig)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    name: str = option("adamw", "adamw | muon | adafactor, or an optax transformation by import path (pkg.mod:fn)")
    learning_rate: float = option(1e-3, "peak learning rate")
    schedule: str = option("cosine", "cosine | linear | wsd | constant, after warmup")
    warmup: str = option("5%", "length of the warmup: steps ('200'), tokens ('375Mtok') or part of the run ('5%')")
    decay: str = option("100%", "where the decay ends: steps, tokens or part of the run; constant after it")
    cooldown: str = option("20%", "wsd: length of the final linear decay")
    end_factor: float = option(0.1, "final learning rate as a factor of the peak")
    b1: float = option(0.9, "Adam's decay of the first moment")
    b2: float = option(0.95, "Adam's decay of the second moment")
    eps: float = option(1e-8, "Adam's epsilon")
    weight_decay: float = option(0.1, "decoupled weight decay of matrices and embeddings")
    groups: tuple[tuple[str, Mapping[str, Any]], ...] = option(
        (), "(regex, {'lr': multiplier, 'weight_decay': value, 'frozen': bool}) pairs over parameter names; first match"
    )
    layer_decay: float = option(1.0, "learning rate of a layer over that of the one above it (ELECTRA: 0.8); 1 is off")
    clip_norm: float = option(1.0, "global-norm clipping of the gradient; 0 is off")
    ema: float = option(0.0, "decay of the exponential moving average of the weights; 0 is off")
    max_skipped: int = option(20, "stop after this many non-finite updates in a row")
    kwargs: Mapping[str, Any] = option({}, "further arguments of the transformation")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    data: int = option(1, "devices along the data axis (parameters replicated); -1: what is left")
    fsdp: int = option(-1, "devices along the fsdp axis (batch and parameters sharded)")
    tensor: int = option(1, "devices along the tensor axis (heads, ff and vocabulary sharded)")
    sequence: int = option(1, "devices along the sequence axis (tokens of a row sharded)")
    slices: int = option(0, "parts of the machine that a slower network joins (TPU multi-slice); 0: what devices say")
    slice_axis: str = option("data", "the axis that goes across slices: data | fsdp")
    rules: tuple[tuple[str, Any], ...] = option((), "extra (logical axis, mesh axis) rules, tried before the defaults")


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    devices: int = option(0, "devices that the job must find, on all hosts together; 0: whatever is there")
    device_kind: str = option("", "and a part of their kind's name, e.g. 'v5p' or 'H100'; empty: any")
    join_seconds: float = option(300.0, "how long processes wait for each other at the start")
    heartbeat_seconds: float = option(60.0, "a process that was silent for so long is lost, and the others end")


@dataclasses.dataclass(frozen=True)
class CompilerConfig:
    flags: str = option("default", "flags for the backend at hand: default (gpt_jax/compiler_flags.py) | none")
    extra: tuple[str, ...] = option((), "further flags, ('--name=value', ...); the environment's own come first")


@dataclasses.dataclass(frozen=True)
class InitConfig:
    source: str = option("", "`init.from`: a run's workdir or checkpoint whose weights to start from, by name")
    model: bool = option(True, "take the shape of the model (model.*) from that run too; False keeps this config's")
    rename: tuple[tuple[str, str], ...] = option(
        (), "(regex, replacement) pairs over that run's parameter names, e.g. (('^model/', 'reference/'),)"
    )

    def __post_init__(self) -> None:
        for pair in self.rename:
            try:
                regex, replacement = pair if isinstance(pair, tuple) else (None, "")
                re.sub(regex, replacement, "")
            except (re.error, IndexError, TypeError, ValueError) as error:
                form = "it takes pairs of a regex and a replacement, (('^model/', 'reference/'),)"
                raise UserError(f"rename has {pair!r} ({error}); {form}.") from None


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    every_steps: int = option(500, "save every so many steps; 0: only at the end")
    every_minutes: float = option(0.0, "save when so many minutes have passed since the last; 0 is off")
    keep_last: int = option(2, "checkpoints kept: the last n")
    keep_best: int = option(1, "and the best n by validation loss")
    keep_every_steps: int = option(0, "and those at multiples of this; 0 is off")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    every_steps: int = option(250, "validate every so many steps; 0: only at the end")
    max_batches: int = option(20, "batches of a validation during training; 0 is the whole split")
    max_generated: int = option(100, "examples of a task whose text is generated in one during training; 0 is all")
    batch_size: int = option(0, "sequences of a validation batch; 0 uses batch_size")
    weights: str = option("auto", "which weights are evaluated, sampled, exported: raw | ema | average | auto")
    tasks: tuple[Any, ...] = option((), "benchmarks run with every validation, as `gpt-jax eval --tasks` names them")
    task_limit: int = option(100, "and how many items of each (of each of its groups); 0 is all")
    task_shots: int = option(0, "and how many demonstrations before each item")


@dataclasses.dataclass(frozen=True)
class LogConfig:
    every_steps: int = option(1, "a training row in metrics.jsonl every so many steps")
    console_every_steps: int = option(10, "a line on the console every so many steps")
    tensorboard: bool = option(True, "write TensorBoard events")
    copy_to: str = option("", "gs:// or s3:// URL that logs and report are copied to at each save; empty is off")
    wandb: str = option("", "a Weights & Biases project (extra `wandb`); empty is off")
    spike_z: float = option(6.0, "keep the batch, norms and row losses of a step whose z-score is above; 0 is off")


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    prompts: tuple[str, ...] = option(("",), "prompts continued during training")
    every_steps: int = option(0, "sample every so many steps; 0: only at the end")
    max_tokens: int = option(100, "tokens generated per prompt")
    temperature: float = option(0.8, "sampling temperature")
    top_k: int = option(0, "keep the k most likely tokens; 0 is off")
    top_p: float = option(0.95, "nucleus: keep the smallest set with this probability")


@dataclasses.dataclass(frozen=True)
class Config:
    name: str = option("", "the run's name, for logs")
    steps: int = option(1000, "optimizer steps of the run")
    seed: int = option(0, "the one seed: parameters, data order, dropout, masks, sampling")
    batch_size: int = option(32, "global batch in sequences")
    context_length: int = option(256, "tokens of a sequence")
    microbatches: int = option(1, "pieces a batch is cut into: same gradient, less memory")
    batch_schedule: tuple[tuple[str, Any], ...] = option(
        (),
        "smaller batches at first: ((until, sequences), ...), until as in optimizer.warmup; (from, to) sequences grow "
        "linearly in whole micro-batches, to 0 being batch_size",
    )
    deterministic: bool = option(False, "deterministic GPU kernels: bitwise repeatable, slower")
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    objective: Mapping[str, Any] = option({"name": "causal_lm"}, "the objective's name (or pkg.mod:Class) and options")
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)
    compiler: CompilerConfig = dataclasses.field(default_factory=CompilerConfig)
    init: InitConfig = dataclasses.field(default_factory=InitConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)
    sample: SampleConfig = dataclasses.field(default_factory=SampleConfig)

    def __post_init__(self) -> None:
        check_ranges(self)


_SPELLED = {"from": "source"}  # `init.from` cannot be a field name in Python


def base() -> ml_collections.ConfigDict:
    """Returns the base config as a locked ConfigDict that a config file changes."""
    return ml_collections.ConfigDict(to_dict(Config()))


def to_dict(config: Any) -> dict[str, Any]:
    """Returns a (nested) config dataclass as plain dicts, in field order, as config files spell the keys."""
    out = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        name = "from" if isinstance(config, InitConfig) and field.name == "source" else field.name
        out[name] = to_dict(value) if dataclasses.is_dataclass(value) else _thaw(value)
    return out


def load(name_or_path: str, overrides: Mapping[str, str] | Sequence[tuple[str, str]] = ()) -> Config:
    """Reads a config file by path or by its name in configs/, applies overrides and checks every key.

    Args:
      name_or_path: 'quickstart', 'configs/quickstart.py' or a file anywhere.
      overrides: dotted key to text, e.g. {'model.num_layers': '4'}.

    Returns:
      The frozen Config.

    Raises:
      UserError: no such file, an unknown key (the closest named), a value of the wrong type.
    """
    path = find_config(name_or_path)
    tree = _run_config_file(path)
    tree.setdefault("name", "")
    tree["name"] = tree["name"] or path.stem
    return resolve(tree, overrides)


def resolve(
    tree: Mapping[str, Any] | ml_collections.ConfigDict, overrides: Mapping[str, str] | Sequence[tuple[str, str]] = ()
) -> Config:
    """Makes a frozen Config of a (partial) tree and dotted overrides; raises UserError on any key not known."""
    if isinstance(tree, ml_collections.ConfigDict):
        tree = tree.to_dict()
    tree = _thaw(tree)
    for key, text in dict(overrides).items():
        _set_dotted(tree, key, text)
    return _build(Config, tree, "")


def describe(config: Config) -> str:
    """Returns every resolved key with its value and its line of meaning (`--print-config`)."""
    lines = []

    def visit(node: Any, prefix: str) -> None:
        for field in dataclasses.fields(node):
            value = getattr(node, field.name)
            name = "from" if isinstance(node, InitConfig) and field.name == "source" else field.name
            if dataclasses.is_dataclass(value):
                visit(value, f"{prefix}{name}.")
            else:
                lines.append(f"{prefix + name} = {_show(value)}".ljust(48) + f"  # {field.metadata.get('help', '')}")

    visit(config, "")
    return "\n".join(lines)


def config_folders() -> list[pathlib.Path]:
    """Returns the folders where config files are looked up by name: ./configs, then the source tree's."""
    folders = [pathlib.Path.cwd() / "configs", pathlib.Path(__file__).resolve().parent.parent / "configs"]
    return [f for f in dict.fromkeys(folders) if f.is_dir()]


def find_config(name_or_path: str) -> pathlib.Path:
    """Returns the file of a config given by path or name; raises UserError naming the closest one."""
    path = pathlib.Path(name_or_path)
    if path.is_file():
        return path
    names = {}
    for folder in config_folders():
        for file in sorted([*folder.glob("*.py"), *folder.glob("*/*.py")]):
            if not file.name.startswith("_"):
                names.setdefault(file.stem, file)
                names.setdefault(str(file.relative_to(folder).with_suffix("")), file)
    stem = name_or_path.removeprefix("configs/").removesuffix(".py")
    if stem in names:
        return names[stem]
    raise UserError(
        f"no config file {name_or_path!r}{nearest(stem, names)}; give a path or a name in configs/: "
        f"{', '.join(sorted(n for n in names if '/' not in n)) or 'none found'}."
    )


def call_config_file(path: pathlib.Path, function: str) -> Any:
    """Runs a config file and returns what its function `function` returns; its mistakes become a UserError."""
    spec = importlib.util.spec_from_file_location(f"gpt_jax_config_{path.stem}", path)
    if spec is None:
        hint = "; to continue a run give --workdir alone" if function == "get_config" else ""
        raise UserError(f"{path} is no Python file{hint}.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        return getattr(module, function)()
    except AttributeError as error:
        if not hasattr(module, function):
            raise UserError(f"{path} does not define {function}().") from None
        raise UserError(f"{path}: {' '.join(str(error).split())}") from None
    except KeyError as error:
        raise UserError(f"{path}: {' '.join(str(error.args[0] if error.args else error).split())}") from None
    except UserError:
        raise
    except Exception as error:  # whatever the user's file does wrong
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        where = f"{path}, line {lines[-1]}" if lines else path
        raise UserError(f"{where}: {type(error).__name__}: {' '.join(str(error).split())}") from None


def _run_config_file(path: pathlib.Path) -> dict[str, Any]:
    tree = call_config_file(path, "get_config")
    if isinstance(tree, ml_collections.ConfigDict):
        return tree.to_dict()
    if not isinstance(tree, Mapping):
        raise UserError(f"{path}: get_config() returned {tree!r}, not a config (see gpt_jax.config.base).")
    return dict(tree)


def _set_dotted(tree: dict[str, Any], key: str, text: str) -> None:
    *folders, last = key.split(".")
    node, default = tree, to_dict(Config())
    for depth, name in enumerate(folders):
        default = default.get(name, {}) if isinstance(default, dict) else {}
        if name not in node:  # a mapping that is one value (objective) keeps its other entries
            node[name] = dict(default) if isinstance(default, dict) else {}
        node = node[name]
        if not isinstance(node, dict):
            raise UserError(f"--config.{key}: {'.'.join(folders[: depth + 1])!r} is a value, not a group of keys.")
    node[last] = text if not isinstance(text, str) else _Text(text)


class _Text(str):
    """An override as typed on the command line: its type is the field's."""


def _build(cls: type, tree: Mapping[str, Any], prefix: str) -> Any:
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    spelled = _SPELLED if cls is InitConfig else {}
    if not isinstance(tree, Mapping):
        raise UserError(f"config key {prefix.rstrip('.')!r} is a group of keys, not {tree!r}.")
    values = {}
    for key, value in tree.items():
        name = spelled.get(key, key)
        if name not in fields or key in spelled.values():
            allowed = [k for k in fields if k not in spelled.values()] + list(spelled)
            raise UserError(
                f"unknown config key {prefix + str(key)!r}{nearest(str(key), allowed)}; allowed: {', '.join(allowed)}."
            )
        if dataclasses.is_dataclass(hints[name]):
            values[name] = _build(hints[name], value, f"{prefix}{key}.")
        else:
            values[name] = _coerce(value, hints[name], prefix + str(key))
    try:
        return cls(**values)
    except UserError as error:
        raise UserError(f"{prefix}{error}" if prefix else str(error)) from None


def _coerce(value: Any, hint: Any, key: str) -> Any:
    """Returns `value` as the field's type; text from the command line is read as a Python literal if it can be."""
    typed = isinstance(value, _Text)
    origin = typing.get_origin(hint) or hint
    of_text = origin is tuple and typing.get_args(hint)[:1] == (str,)
    if origin in (typing.Union, types.UnionType):
        options = [a for a in typing.get_args(hint) if a is not type(None)]
        if value is None or (typed and value == "None"):
            return None
        return _coerce(value, options[0], key)
    if hint is str:
        if isinstance(value, str):
            return str(value)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return str(value)
    else:
        if typed:
            text, value = str(value), _literal(str(value))
            if of_text and not isinstance(value, (str, list, tuple)):
                value = text
            if origin is tuple and isinstance(value, str):
                value = tuple(v.strip() for v in value.split(",") if v.strip())
        if hint is bool and isinstance(value, str) and value.lower() in ("true", "false"):
            value = value.lower() == "true"
        if hint is bool and isinstance(value, bool):
            return value
        if hint is int and isinstance(value, int) and not isinstance(value, bool):
            return value
        if hint is int and isinstance(value, float) and value.is_integer():
            return int(value)
        if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if origin is tuple and isinstance(value, (list, tuple)):
            return tuple(_coerce(v, str, key) for v in value) if of_text else _freeze(value)
        is_mapping = origin is Mapping or getattr(origin, "__name__", "") == "Mapping"
        if is_mapping and isinstance(value, Mapping):
            return _freeze(value)
        if hint is Any:
            return _freeze(value)
    names = {str: "text", int: "a whole number", float: "a number", bool: "true or false", tuple: "a tuple"}
    raise UserError(f"config key {key!r} takes {names.get(origin, 'a mapping')}, not {value!r}.")


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _freeze(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _freeze(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(_freeze(v) for v in value)
    if isinstance(value, _Text):
        return _literal(str(value))
    return value


def _thaw(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _thaw(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(_thaw(v) for v in value)
    return value


def _show(value: Any) -> str:
    return repr(value)


def dumps(config: Config) -> str:
    """Returns the resolved config as JSON (tuples become lists); `loads` reads it back."""
    return json.dumps(to_dict(config), indent=2)


def loads(text: str) -> Config:
    """Reads a resolved config written by `dumps`."""
    return resolve(json.loads(text))
