"""Every command and snippet of the README and of docs/ runs, at tiny sizes: what they say stays true."""

import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from gpt_jax.workdir import _COPIED

ROOT = pathlib.Path(__file__).resolve().parent.parent
DOCS = [*sorted(page.stem for page in (ROOT / "docs").glob("[a-z]*.md")), "PODS"]  # the others in capitals are records
PAGES = ["README.md", *(f"docs/{page}.md" for page in DOCS)]
TINY = [
    *("--config.model.num_layers=1", "--config.model.d_model=32", "--config.model.num_heads=2"),
    *("--config.batch_size=16", "--config.context_length=32", "--config.data.tokenizer.vocab_size=400"),
    *("--config.eval.max_batches=2", "--config.sample.max_tokens=4", "--config.log.tensorboard=False"),
]
FENCE = re.compile(r"^```(python|bash)([^\n]*)\n(.*?)^```", re.M | re.S)
INSTALLING = ("scripts/quickstart.sh", "scripts/test.sh", "pip install", "git clone")


def shrink(command: str) -> str:
    """Makes a documented command tiny; its own flags win."""
    if "gpt-jax train" in command or re.search(r"gpt-jax data\b(?!.*--workdir)", command):
        named = {word.split("=")[0] for word in shlex.split(command)}
        tiny = [flag for flag in TINY if flag.split("=")[0] not in named]
        if "=rl/" in command:  # prompts of a fixed length
            tiny.remove("--config.context_length=32")
        if "--config.steps" not in named and "gpt-jax train" in command:
            tiny.append("--config.steps=4")
        return f"{command} {' '.join(tiny)}"
    if "gpt-jax ablate --config" in command:  # the same of all that share a workdir
        few = [] if "ablations" not in command else ["--config.steps=3", "--seeds=2"]
        return f"{command} {' '.join([*few, *(flag for flag in TINY if 'num_heads' not in flag)])}"
    return command


def blocks(page: str):
    for language, info, body in FENCE.findall((ROOT / page).read_text()):
        yield language, info.strip(), body


def environment_of(folder: pathlib.Path) -> dict[str, str]:
    scripts = str(pathlib.Path(sys.executable).parent)
    return {
        **os.environ,
        "PATH": f"{scripts}:{os.environ['PATH']}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": f"{folder}:{ROOT}",
        "XLA_FLAGS": "",
    }


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_every_command_and_snippet_runs(page, tmp_path):
    environment, ran = environment_of(tmp_path), 0
    for language, info, body in blocks(page):
        if language == "python":
            named = re.search(r"file=(\S+)", info)
            path = tmp_path / (named[1] if named else f"snippet{ran}.py")
            path.write_text(body)
            if named:
                continue
            commands = [f"{shlex.quote(sys.executable)} {path.name}"]
        else:
            joined = body.replace("\\\n", " ")
            commands = [line for line in joined.splitlines() if line.strip() and not line.lstrip().startswith("#")]
        for command in commands:
            command = command.split("  #")[0].strip()
            if any(word in command for word in INSTALLING):
                continue
            done = subprocess.run(
                ["bash", "-c", shrink(command)],
                cwd=tmp_path,
                env=environment,
                capture_output=True,
                text=True,
                timeout=600,
            )
            assert done.returncode == 0, f"{page}: {command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
            ran += 1
    assert ran >= 1


@pytest.mark.slow
def test_the_quickstart_ends_with_its_figures_as_json(tmp_path):
    """All but the installation and the embedded corpus, which takes its time."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "quickstart.sh", tmp_path / "scripts")
    (tmp_path / "scripts" / "_venv.sh").write_text("ensure_venv() { :; }\n")
    (tmp_path / "text.txt").write_text("".join((ROOT / page).read_text() for page in PAGES))
    data = ["--config.data.path=text.txt", "--config.data.split=tail", "--config.data.tokenizer.kind=byte"]
    command = ["bash", "scripts/quickstart.sh", "--config.steps=4", *TINY, *data]
    environment = environment_of(tmp_path) | {"WORKDIR": str(tmp_path / "run")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    (last,) = done.stdout.splitlines()
    found = json.loads(last)
    names = ("bits_per_byte", "xz_bits_per_byte", "unigram_bits_per_byte", "seconds")
    assert set(found) == {*names, "report"} and all(found[name] > 0 for name in names), last
    assert pathlib.Path(found["report"]).is_file()
    assert "The " in done.stderr  # the sample


def test_the_page_names_all_that_lies_in_a_run():
    text = (ROOT / "docs" / "resume.md").read_text()
    missing = [name for name in _COPIED if name != "wandb_id" and not re.search(rf"`{re.escape(name)}/?`", text)]
    assert not missing


def test_shrinking_keeps_a_commands_own_flags():
    command = shrink("gpt-jax train --config=quickstart --config.batch_size=4")
    assert "--config.batch_size=4" in command and "--config.batch_size=16" not in command
    assert "--config.steps=4" in command
