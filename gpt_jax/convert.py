"""The command `gpt-jax convert`: Hugging Face's GPT-2, Llama 3 and Qwen3 (dense) to a run, and a run to theirs.

Weights are safetensors and nothing else: no pickle is ever opened. They go shard by shard: each device's part of each
parameter is read from where it lies in the files, and in the other direction one parameter is in memory at a time.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax.checkpoint import Checkpointer, find_checkpoint, read_metadata
from gpt_jax.config import Config, resolve, to_dict
from gpt_jax.data.tokenizer import Tokenizer
from gpt_jax.errors import UserError, choose
from gpt_jax.files import remove_folder
from gpt_jax.hooks import strip
from gpt_jax.inherit import OWN_MODEL_KEYS
from gpt_jax.interop import FAMILIES
from gpt_jax.interop.mapping import Family, Layout
from gpt_jax.interop.tensor_files import Tensors, TensorWriter
from gpt_jax.interop.tokenizer_files import find_tokenizer, write_tokenizer
from gpt_jax.loading import read_params, tokenizer_of
from gpt_jax.model import ModelConfig, Transformer, count_parameters
from gpt_jax.model.lora import merge_lora
from gpt_jax.objectives.base import Setting, build_objective
from gpt_jax.optim import make_optimizer
from gpt_jax.remote import refuse_url
from gpt_jax.run import fill_in, mesh_of
from gpt_jax.sharding import DEFAULT_RULES, path_name, unbox
from gpt_jax.step import build_train_step
from gpt_jax.workdir import open_workdir

_CONTEXT = 1024  # of an imported run where its model has room for more
_DTYPES = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float16"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.add_argument("--from-hf", default="", metavar="DIR", help="a folder of weights to import into --workdir")
    parser.add_argument("--to-hf", default="", metavar="DIR", help="a new folder to export the run in --workdir to")
    parser.add_argument("--workdir", required=True, help="the run that is made, or that is exported")
    parser.add_argument("--step", type=int, default=None, help="--to-hf: checkpoint; default: the newest")
    parser.add_argument("--weights", default="auto", help="--to-hf: raw | ema | average | auto")
    parser.add_argument("--dtype", default="float32", help="--to-hf: of the weights: " + " | ".join(_DTYPES))
    parser.add_argument("--max-file-gb", type=float, default=5.0, help="--to-hf: the largest file of weights")


def main(args: argparse.Namespace, overrides: Mapping[str, str]) -> int:
    """Runs the command."""
    if bool(args.from_hf) == bool(args.to_hf):
        raise UserError("convert takes either --from-hf DIR or --to-hf DIR.")
    if args.from_hf:
        result = from_hf(args.from_hf, args.workdir, overrides)
    else:
        if overrides:
            raise UserError(f"convert --to-hf takes no --config.{next(iter(overrides))}: the run's own config is used.")
        if not 0 <= args.max_file_gb < float("inf"):
            raise UserError(f"--max-file-gb is {args.max_file_gb}; it must be a number above 0, or 0 for no bound.")
        most = int(args.max_file_gb * 1e9)
        result = to_hf(args.to_hf, args.workdir, step=args.step, weights=args.weights, dtype=args.dtype, most=most)
    print(json.dumps(result))
    return 0


# ---- from theirs to ours


def from_hf(
    folder: str | os.PathLike,
    workdir: str | os.PathLike,
    overrides: Mapping[str, str] | None = None,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Makes a run of a folder with config.json, safetensors and, if there are any, tokenizer files.

    The run has a checkpoint of step 0, so that `sample`, `eval`, `gpt_jax.load` and `init.from` take it; it has no
    moments to train on with, and its config names a stateless optimizer.

    Args:
      folder: the model. workdir: a new run directory.
      overrides: of the run's config: mesh, data, context_length, batch_size, and how the model is executed.

    Returns:
      What the command prints last.

    Raises:
      UserError: what the folder holds is not supported, named; the run directory holds a run already.
    """
    refuse_url(folder, "--from-hf", "copy the model's folder to a disk")
    refuse_url(workdir, "--workdir of an import", "import into a folder, then copy it to the bucket")
    folder = pathlib.Path(folder)
    tree = _read_config(folder)
    family = FAMILIES[choose("model_type in config.json", str(tree.get("model_type")), FAMILIES)]
    options = family.read(tree)
    tensors = Tensors(folder)
    tokenizer = find_tokenizer(folder, family.name, tree, options["vocab_size"])
    config = _imported_config(folder, workdir, options, tokenizer, overrides or {})
    layout = _layout(config.model, family)
    tensors = _checked(tensors, layout, family, config.model)
    log(f"{family.name} with {count_parameters(config.model):,} parameters; tokenizer: {tokenizer.kind}")
    if tokenizer.kind == "ids":
        log("no tokenizer files: prompts are token ids separated by spaces, and so are texts")
    if isinstance(ends := tree.get("eos_token_id"), list) and len(ends) > 1:
        rest = ", ".join(map(str, ends[1:]))
        log(f"config.json names {len(ends)} end tokens: texts end at {ends[0]}, and not at {rest}")
    with open_workdir(workdir) as directory:
        if not directory.is_new:
            raise UserError(f"--workdir is {str(workdir)!r}, which holds a run already: give a new one.")
        for leftover in (directory.checkpoints_path, directory.tokenizer_path) if directory.writes else ():
            if leftover.is_dir():  # of an import that was killed
                remove_folder(leftover)
        with tempfile.TemporaryDirectory() as temporary:
            tokenizer.save(temporary)
            directory.save_tokenizer(temporary)
        with Checkpointer(directory.checkpoints_path) as checkpointer:
            state = _state(config, tokenizer, layout, tensors)
            checkpointer.save(0, strip(state), metadata=directory.checkpoint_metadata(to_dict(config)))
            checkpointer.wait()
        directory.write_environment()
        directory.add_history("import", 0, folder=str(folder), family=family.name)
        directory.write_config(to_dict(config))
    return {
        "workdir": str(workdir),
        "family": family.name,
        "parameters": count_parameters(config.model),
        "tensors": len(layout.tensor_shapes()),
        "tokenizer": tokenizer.kind,
        "context_length": config.context_length,
    }


def _read_config(folder: pathlib.Path) -> dict[str, Any]:
    try:
        tree = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"--from-hf is {str(folder)!r}, which has no config.json.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'config.json'} cannot be read: {error}.") from None
    if not isinstance(tree, dict):
        raise UserError(f"{folder / 'config.json'} is no config: it holds {tree!r}.")
    return tree


def _imported_config(
    folder: pathlib.Path,
    workdir: str | os.PathLike,
    options: Mapping[str, Any],
    tokenizer: Tokenizer,
    overrides: Mapping[str, str],
) -> Config:
    for key in overrides:
        group, _, rest = key.partition(".")
        mine = OWN_MODEL_KEYS.fullmatch(rest) or rest == "vocab_multiple"
        if group in ("objective", "init", "optimizer") or (group == "model" and not mine):
            raise UserError(f"convert takes no --config.{key}: it is the imported model's.")
    tree = {
        "name": folder.resolve().name,
        "steps": 1,
        "batch_size": 8,
        "context_length": min(_CONTEXT, options["max_positions"]),
        "model": {**options, "unroll": 0 if options["num_layers"] <= 12 else 1},
        "optimizer": {"name": "optax:sgd"},
        "data": {
            "tokenizer": {
                "path": str(pathlib.Path(workdir).absolute() / "tokenizer"),
                "specials": tuple(tokenizer.specials),
            }
        },
        "sample": {"prompts": ()},
    }
    return fill_in(resolve(tree, overrides), tokenizer.vocab_size)


def _shapes(model: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Our parameters by name, stacked over layers."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    tree = unbox(jax.eval_shape(Transformer(model).init, jax.random.key(0), tokens)["params"])
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _layout(model: ModelConfig, family: Family) -> Layout:
    return Layout(model, family.tensors(model), {name: leaf.shape for name, leaf in _shapes(model).items()})


def _checked(tensors: Mapping[str, np.ndarray], layout: Layout, family: Family, model: ModelConfig) -> dict[str, Any]:
    """The tensors by the names of the table; raises UserError naming one that is missing, too many or another shape."""
    expected, out, left = layout.tensor_shapes(), {}, dict(tensors)
    for name, shape in expected.items():
        found = name if name in left else name.removeprefix(family.prefix)
        if found not in left:
            raise UserError(f"the weights have no tensor {name!r}, which config.json asks for.")
        out[name] = left.pop(found)
        if out[name].shape != shape:
            raise UserError(f"tensor {found!r} has shape {out[name].shape}; config.json asks for {shape}.")
        if not jnp.issubdtype(out[name].dtype, jnp.floating):
            raise UserError(f"tensor {found!r} has dtype {out[name].dtype}; weights must be floating-point numbers.")
    for name, value in left.items():
        if re.fullmatch(family.ignored, name):
            continue
        if name == "lm_head.weight" and model.tie_embeddings:
            first = next(iter(out.values()))
            if value.shape == first.shape and np.array_equal(value, first):
                continue
            raise UserError("tensor 'lm_head.weight' is not the embedding, but config.json ties them.")
        raise UserError(f"tensor {name!r} has no place in a model of type {family.name!r}.")
    return out


def _state(config: Config, tokenizer: Tokenizer, layout: Layout, tensors: Mapping[str, np.ndarray]) -> Any:
    """The state of a run at step 0: each device's shards read from the tensors, everything else 0."""
    setting = Setting(
        model=config.model,
        specials=tokenizer.specials,
        steps=config.steps,
        batch_size=config.batch_size,
        context_length=config.context_length,
    )
    objective = build_objective(config.objective, setting)
    step = build_train_step(
        objective,
        make_optimizer(config.optimizer.name, 0.0),
        objective.batch_spec(config.batch_size, config.context_length),
        mesh=mesh_of(config),
        rules=(*config.mesh.rules, *DEFAULT_RULES),
    )

    def place(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = path_name(path)
        dtype = np.dtype(leaf.dtype)

        def shard(index: tuple[slice, ...]) -> np.ndarray:
            if name.startswith("params/model/"):
                return layout.gather(name.removeprefix("params/model/"), index, tensors, dtype)
            return np.zeros([len(range(*s.indices(n))) for s, n in zip(index, leaf.shape, strict=True)], dtype)

        return jax.make_array_from_callback(leaf.shape, leaf.sharding, shard)

    return jax.tree_util.tree_map_with_path(place, step.abstract_state)


# ---- from ours to theirs


def to_hf(
    folder: str | os.PathLike,
    workdir: str | os.PathLike,
    *,
    step: int | None = None,
    weights: str = "auto",
    dtype: str = "float32",
    most: int = 0,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Writes a run's model as config.json, safetensors and tokenizer files that transformers' `from_pretrained` reads.

    Args:
      folder: a new one, or an empty one. workdir: the run, or one of its checkpoints.
      step, weights: as in `load`. dtype: of the weights. most: bytes of a file, 0 is no bound.

    Returns:
      What the command prints last.

    Raises:
      UserError: a variant of the model that no family has, named; the folder is not empty.
    """
    choose("--dtype", dtype, _DTYPES)
    if jax.process_count() > 1:
        raise UserError("convert --to-hf runs in one process.")
    refuse_url(folder, "--to-hf", "export to a folder, then copy it to the bucket")
    folder = pathlib.Path(folder).resolve()  # a link to an empty folder is that folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--to-hf is {str(folder)!r}, which is not an empty folder.")
    checkpoints, found = find_checkpoint(workdir, step)
    metadata = read_metadata(checkpoints, found)
    config, tokenizer = resolve(metadata["config"]), tokenizer_of(metadata)
    model = config.model
    if model.positions != "learned":  # theirs say how long a text the model was trained on, ours only bounds a table
        model = dataclasses.replace(model, max_positions=max(model.max_positions, config.context_length))
    read, model = _reader(checkpoints, found, weights, model)
    family = family_of(model)
    layout = _layout(model, family)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    try:
        shapes = layout.tensor_shapes()
        writer = TensorWriter(partial, shapes, jnp.dtype(dtype), most)
        for leaf in layout.shapes:
            for name, value in layout.cut(leaf, read(leaf)):
                writer.write(name, value)
        for name in layout.zeros:
            writer.write(name, 0)
        writer.close()
        tree = {
            "architectures": [family.architecture],
            "model_type": family.name,
            **family.write(model),
            "torch_dtype": dtype,
            "bos_token_id": next(iter(tokenizer.begin), tokenizer.eot),
            "eos_token_id": tokenizer.eot,
        }
        (partial / "config.json").write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
        missing = write_tokenizer(tokenizer, partial, model.max_positions)
        partial.chmod(0o755)
        os.replace(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if missing:
        log(f"no tokenizer files: {missing}")
    log(f"{family.name} with {count_parameters(model):,} parameters in {len(writer.files)} files")
    return {
        "folder": str(folder),
        "family": family.name,
        "step": found,
        "parameters": count_parameters(model),
        "tensors": len(shapes),
        "files": writer.files,
        "tokenizer": not missing,
    }


def family_of(model: ModelConfig) -> Family:
    """Returns the family that a model belongs to; raises UserError naming what the nearest one has not."""
    everywhere = [
        f"{name}={getattr(model, name)!r}"
        for name in ("head_dims", "logit_softcap", "attention_softcap", "talking_heads")
        if getattr(model, name)
    ]
    if model.embed_size != model.d_model:
        everywhere.append(f"embedding_size={model.embed_size}")
    if "band" in model.pattern:
        everywhere.append(f"pattern={model.pattern!r}")
    misfits = {name: [*everywhere, *family.misfits(model)] for name, family in FAMILIES.items()}
    nearest = min(misfits, key=lambda name: len(misfits[name]))
    if misfits[nearest]:
        raise UserError(
            f"the model is of no family that Hugging Face has: {nearest} has no {', '.join(misfits[nearest])}."
        )
    return FAMILIES[nearest]


def _reader(
    checkpoints: pathlib.Path, step: int, weights: str, model: ModelConfig
) -> tuple[Callable[[str], np.ndarray], ModelConfig]:
    """Returns name -> parameter, whole, on the host; LoRA's are merged first, which takes all of them at once."""
    choose("weights", weights, ("auto", "raw", "ema", "average"))
    if model.lora_rank:
        params, merged = merge_lora(read_params(checkpoints, step, weights)["model"], model)
        leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
        return lambda name: np.asarray(leaves[name]), merged
    shapes = _shapes(model)

    def read(name: str) -> np.ndarray:
        tree: Any = jax.ShapeDtypeStruct(shapes[name].shape, shapes[name].dtype)
        for part in reversed(["model", *name.split("/")]):
            tree = {part: tree}
        return np.asarray(jax.tree.leaves(read_params(checkpoints, step, weights, tree))[0])

    return read, model
