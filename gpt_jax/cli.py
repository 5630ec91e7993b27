"""The console script `gpt-jax`: one subcommand per job. Flags are read here and nowhere below.

    gpt-jax train --config=quickstart --workdir=runs/q --config.model.num_layers=4

A mistake of the user is one line on stderr and exit code 1, never a traceback; 75 means 'stopped, run me again'.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import json
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from gpt_jax import cluster
from gpt_jax.distributed import fingerprint, initialize, is_first, leave, leave_if_several
from gpt_jax.errors import UserError, nearest

COMMANDS = {
    "data": "train a tokenizer, build a token store, show statistics and rows",
    "train": "pre-train, fine-tune: whatever objective the config names",
    "eval": "loss and bits per byte of the validation split; zero- and few-shot benchmarks; quality of generated text",
    "sample": "generate text from a run",
    "augment": "generate training examples or text, filtered, with provenance",
    "plan": "compile a config's train step for a machine that is not here: memory, communication, speed at best",
    "context": "what a run makes of its context, and of more than that: figures and numbers",
    "convert": "Hugging Face GPT-2, Llama 3 and Qwen3 weights to a run, and a run to theirs",
    "ablate": "run a grid of configs x paired seeds, compare the arms with error bars, write the report",
    "inspect": "look into a checkpoint: attention, logit lens, heads, patching, attribution",
    "rerun": "repeat the first steps of a run, and say whether every number is the same",
    "replay": "repeat one step of a run: its rows, norms, and what first was not finite",
}

# Commands with a file of their own, which has `add_arguments(parser)` and `main(args, overrides) -> exit code`.
_MODULES = {
    "context": "gpt_jax.context.command",
    "convert": "gpt_jax.convert",
    "eval": "gpt_jax.eval_command",
    "sample": "gpt_jax.sample",
    "ablate": "gpt_jax.ablate",
    "inspect": "gpt_jax.inspect.command",
    "rerun": "gpt_jax.forensics.rerun",
    "replay": "gpt_jax.forensics.replay",
    "augment": "gpt_jax.augment.command",
    "plan": "gpt_jax.plan",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help).")


def _parser(command: str) -> argparse.ArgumentParser:
    parser = _Parser(prog=f"gpt-jax {command}", description=f"{COMMANDS[command]}.", allow_abbrev=False)
    if command in ("train", "data"):
        parser.add_argument(
            "--config",
            default="",
            metavar="FILE|NAME",
            help="a config file, or its name in configs/; --config.KEY=VALUE overrides a key"
            + ("; default: that of the run in --workdir" if command == "train" else ""),
        )
    if command == "data":
        parser.add_argument(
            "--show", type=int, default=0, metavar="N", help="print N training rows as the model sees them"
        )
        parser.add_argument("--workdir", default="", help="show the data of an existing run instead")
    if command == "train":
        parser.add_argument("--workdir", default="", help="the run's directory; an existing run is continued")
        parser.add_argument(
            "--accept-changes", action="store_true", help="continue a run although numerics or data changed"
        )
        parser.add_argument(
            "--profile", default="", metavar="FIRST:LAST", help="trace these steps for xprof, into WORKDIR/profile"
        )
        parser.add_argument(
            "--print-config", action="store_true", help="show every resolved key with its meaning, and stop"
        )
    if command == "train":
        cluster.add_arguments(parser)
    if command in _MODULES:
        importlib.import_module(_MODULES[command]).add_arguments(parser)
    return parser


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Takes `--config.key=value` and `--config.key value` out of the arguments."""
    rest, overrides = [], {}
    items = iter(arguments)
    for item in items:
        if not item.startswith("--config."):
            rest.append(item)
            continue
        key, equals, value = item.removeprefix("--config.").partition("=")
        if not equals:
            value = next(items, None)
            if value is None or value.startswith("--"):
                raise UserError(f"--config.{key} needs a value: --config.{key}=VALUE.")
        overrides[key] = value
    return rest, overrides


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return _main(argv)
    except UserError as error:
        print(f"gpt-jax: {error}", file=sys.stderr)
        return leave(error.exit_code)
    except KeyboardInterrupt:
        print("gpt-jax: interrupted.", file=sys.stderr)
        return leave(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        from gpt_jax.files import is_no_space

        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:  # whichever path was given
            print(f"gpt-jax: {error.filename!r} is too long for the name of a file.", file=sys.stderr)
            return leave(1)
        if not is_no_space(error):
            leave_if_several(error)
            raise
        print(f"gpt-jax: no space left on the device: {error}.", file=sys.stderr)
    return leave(1)


def _main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        lines = [f"  {name.ljust(width)}  {what}" for name, what in COMMANDS.items()]
        print("usage: gpt-jax COMMAND [--help] ...\n\ncommands:\n" + "\n".join(lines))
        return 0 if argv else 1
    command = argv[0]
    if command not in COMMANDS:
        raise UserError(f"unknown command {command!r}{nearest(command, COMMANDS)}; commands: {', '.join(COMMANDS)}.")
    rest, overrides = split_overrides(argv[1:])
    sys.path.append(os.getcwd())  # import paths of a user's own objectives and optimizers; never instead of ours
    args = _parser(command).parse_args(rest)
    quieten_libraries()
    use_compilation_cache()
    if command in _MODULES:
        return importlib.import_module(_MODULES[command]).main(args, overrides)
    return globals()[f"_{command}"](args, overrides)


def quieten_libraries() -> None:
    """Keeps orbax from logging the traceback of a failure that it also raises: we tell it in one line."""
    from absl import logging

    logging.set_verbosity(logging.FATAL)


def use_compilation_cache() -> None:
    """Keeps compiled programs in $GPT_JAX_CACHE/xla, so that a second start takes seconds."""
    import jax

    from gpt_jax.data.cache import cache_place

    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(cache_place() / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def _data(args: argparse.Namespace, overrides: dict[str, str]) -> int:
    from gpt_jax import config as configs
    from gpt_jax.data.command import run_data
    from gpt_jax.objectives.base import Host, rows_of

    tokenizer = None
    if args.workdir:
        from gpt_jax.inherit import saved_run

        config, tokenizer = saved_run(args.workdir, overrides)
    else:
        config = configs.load(args.config, overrides) if args.config else configs.resolve({}, overrides)
    result = run_data(
        config.data,
        context_length=config.context_length,
        batch_size=config.batch_size,
        seed=config.seed if config.data.seed < 0 else config.data.seed,
        rows=lambda tokenizer: rows_of(
            config.objective, Host(tokenizer.specials, config.context_length, config.batch_size)
        ),
        show=args.show,
        tokenizer=tokenizer,
    )
    return _print_json(result)


def _train(args: argparse.Namespace, overrides: dict[str, str]) -> int:
    from gpt_jax import config as configs

    config = configs.load(args.config, overrides) if args.config else _config_of_run(args.workdir, overrides)
    if args.print_config:
        from gpt_jax.objectives.base import describe_options

        print(configs.describe(config))
        print(describe_options(config.objective))
        return 0
    if not args.workdir:
        raise UserError("--workdir is missing: where the run goes, e.g. --workdir=runs/first.")
    from gpt_jax.profiling import Startup, parse_steps, process_seconds
    from gpt_jax.train import train

    startup = Startup(process_seconds())
    join_job(args, config)
    startup.mark("join")
    profile = parse_steps(args.profile)
    summary = train(config, args.workdir, accept_changes=args.accept_changes, profile=profile, startup=startup)
    code = summary.pop("exit_code")
    if is_first():
        _print_json(summary)
    return code


def _config_of_run(workdir: str, overrides: dict[str, str]) -> Any:
    """The config of the run that is to be continued."""
    from gpt_jax import config as configs
    from gpt_jax.inherit import saved_config

    if not workdir:
        raise UserError("--config is missing: a file, or a name in configs/; or --workdir, of a run to continue.")
    try:
        tree = saved_config(workdir)
    except UserError as error:
        raise UserError(f"--config is missing, and no run is there to continue: {error}") from None
    return configs.resolve(tree, overrides)


def join_job(args: argparse.Namespace, config: Any) -> None:
    """Joins the other processes of a job, if there are any: all must have the same config. No device before this."""
    from gpt_jax import config as configs
    from gpt_jax.compiler_flags import apply_flags

    apply_flags(config.compiler.flags, config.compiler.extra)
    initialize(
        cluster.environment_of(args),
        heartbeat_seconds=config.distributed.heartbeat_seconds,
        join_seconds=config.distributed.join_seconds,
        facts={"the config": fingerprint(configs.to_dict(config)), "--workdir": args.workdir},
    )


def _print_json(result: dict[str, Any]) -> int:
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
