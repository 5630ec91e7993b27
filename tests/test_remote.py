"""Object stores, on the in-memory and the local driver: token stores, text and logs, and who needs a real folder."""

import json
import pathlib

import jax
import numpy as np
import pytest
import tensorstore

from gpt_jax import checkpoint_folder, launch
from gpt_jax.checkpoint import Checkpointer, find_checkpoint
from gpt_jax.cli import main, use_compilation_cache
from gpt_jax.config import resolve
from gpt_jax.data.build import build_store
from gpt_jax.data.cache import cache_root
from gpt_jax.data.prepare import prepare_data
from gpt_jax.data.readers import expand_paths
from gpt_jax.data.store import fetch_store, is_store, open_store
from gpt_jax.data.tokenizer import ByteTokenizer
from gpt_jax.errors import UserError
from gpt_jax.hooks import copier
from gpt_jax.remote import Remote, download, fetch_file, is_url, reaching, run_folder, upload
from gpt_jax.tasks import load_task
from gpt_jax.workdir import Workdir, open_workdir


@pytest.fixture
def memory():
    """A store in memory, as `Remote` and as (url, context)."""
    context = tensorstore.Context()
    return Remote("memory://bucket/a", context), context


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GPT_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def store(tmp_path):
    documents = [("train", "to be or not"), ("train", "to be"), ("valid", "that is")]
    return build_store(documents, ByteTokenizer(("eot",)), tmp_path / "store", workers=1)


def put(folder, remote):
    for path in pathlib.Path(folder).rglob("*"):
        if path.is_file():
            remote.write(path.relative_to(folder).as_posix(), path.read_bytes())


def test_urls_are_told_from_paths():
    assert all(map(is_url, ("gs://b/x", "s3://b/x", "file:///x", "memory://x")))
    assert not any(map(is_url, ("/gs/x", "gs:/x", "C://x", pathlib.Path("runs/x"))))


def test_objects_are_written_read_and_listed(memory):
    remote, context = memory
    remote.write("b/c", b"0123456789")
    remote.write("d", b"")
    assert remote.list() == ["b/c", "d"]
    assert remote.read("b/c") == b"0123456789" and remote.read("b/c", 2, 5) == b"234" and remote.read("d") == b""
    assert remote.read("none") is None
    assert Remote("memory://bucket", context).read("a/d") == b""


def test_large_objects_come_in_pieces(memory, tmp_path, monkeypatch):
    remote, _ = memory
    monkeypatch.setattr("gpt_jax.remote._CHUNK", 7)
    data = bytes(range(100))
    remote.write("x", data)
    remote.download("x", tmp_path / "deep" / "x", size=100)
    assert (tmp_path / "deep" / "x").read_bytes() == data
    with pytest.raises(UserError, match="memory://bucket/a/none.*no such object"):
        remote.download("none", tmp_path / "y")


def test_a_token_store_is_copied_once_and_is_the_same(memory, store, cache):
    remote, context = memory
    put(store.path, remote)
    said = []
    path = fetch_store("memory://bucket/a", cache, said.append, context)
    assert path == fetch_store("memory://bucket/a", cache, said.append, context)
    assert len(said) == 1 and "copying the token store memory://bucket/a to " in said[0]
    copy = open_store(path, verify=True)
    for name in ("train", "valid"):
        np.testing.assert_array_equal(copy.split(name).tokens, store.split(name).tokens)
    assert copy.load_tokenizer().hash == store.manifest["tokenizer"]


def test_a_damaged_or_missing_token_store_is_named(memory, store, cache):
    remote, context = memory
    with pytest.raises(UserError, match=r"no token store at 'memory://bucket/a' \(manifest.json is missing\)"):
        fetch_store("memory://bucket/a", cache, context=context)
    put(store.path, remote)
    tokens = remote.read("train.tokens")
    remote.write("train.tokens", tokens[:-1] + b"\xff")
    with pytest.raises(UserError, match="checksum of train.tokens differs"):
        fetch_store("memory://bucket/a", cache, context=context)
    manifest = json.loads(remote.read("manifest.json"))
    manifest["files"] = {"../../evil": {"size": 1, "sha256": ""}}
    remote.write("manifest.json", json.dumps(manifest).encode())
    with pytest.raises(UserError, match="names '../../evil'"):
        fetch_store("memory://bucket/a", cache, context=context)
    assert {path.suffix for path in (cache / "stores").iterdir()} <= {".new", ".lock"}  # nothing half done has a name


def test_training_reads_a_token_store_and_text_by_url(store, tmp_path):
    url = f"file://{store.path}"
    assert is_store(url) and not is_store(f"file://{tmp_path}/nothing")
    batches = []
    for path in (str(store.path), url):
        config = resolve({"data": {"path": path, "tokenizer": {"kind": "byte"}}})
        data = prepare_data(config.data, context_length=4, batch_size=2, seed=0, log=None)
        batches.append(data.train.rows(0, slice(0, 2))["tokens"])
    np.testing.assert_array_equal(*batches)
    (tmp_path / "text.txt").write_text("hello")
    (file,) = expand_paths(f"file://{tmp_path}/text.txt")
    assert file.name == "text.txt" and file.read_text() == "hello" and "remote" in file.parts
    with pytest.raises(UserError, match="globs are of files here"):
        expand_paths("gs://bucket/*.txt")
    with pytest.raises(UserError, match="no such object"):
        expand_paths(f"file://{tmp_path}/none.txt")


def test_a_copy_of_an_object_is_made_once(memory, cache):
    remote, context = memory
    remote.write("x.txt", b"first")
    path = fetch_file("memory://bucket/a/x.txt", cache, context=context)
    remote.write("x.txt", b"second")
    assert fetch_file("memory://bucket/a/x.txt", cache, context=context).read_bytes() == b"first"
    assert path.name == "x.txt"


def test_logs_are_copied_and_checkpoints_are_not(tmp_path):
    with open_workdir(tmp_path / "run") as run:
        run.write_config({"a": 1})
        run.metrics_path.write_text('{"step": 1}\n')
        run.write_sample(3, "text")
        (run.path / "checkpoints" / "1").mkdir(parents=True)
        (run.path / "checkpoints" / "1" / "data").write_text("x")
        copied = run.copy_to(f"file://{tmp_path}/out")
    assert copied == ["metrics.jsonl", "samples/step_00000003.txt", "config.json"]  # the config last
    assert (tmp_path / "out" / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert Workdir(tmp_path / "run", writes=False).copy_to("file:///nowhere") == []


def test_a_store_that_fails_does_not_end_a_run(tmp_path):
    said = []
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    (tmp_path / "file").write_text("in the way")
    copier(f"file://{tmp_path}/file/x", Workdir(tmp_path / "run"), said.append)()
    assert len(said) == 1 and said[0].startswith("log.copy_to: cannot ")
    with pytest.raises(UserError, match="log.copy_to is 'runs/x'; it is a URL"):
        copier("runs/x", Workdir(tmp_path / "run"), said.append)


def test_upload_names_what_is_there(memory, tmp_path):
    remote, _ = memory
    (tmp_path / "a").write_text("1")
    assert upload(tmp_path, ["a", "b"], remote) == ["a"] and remote.list() == ["a"]
    known = {}
    assert upload(tmp_path, ["a"], remote, known) == ["a"] and upload(tmp_path, ["a"], remote, known) == []
    (tmp_path / "a").write_text("22")
    assert upload(tmp_path, ["a"], remote, known) == ["a"] and remote.read("a") == b"22"


def test_a_download_makes_the_folder_what_the_store_is(tmp_path):
    there, here = tmp_path / "there", tmp_path / "here"
    for name in ("config.json", "samples/1.txt", "checkpoints/1/data"):
        (there / name).parent.mkdir(parents=True, exist_ok=True)
        (there / name).write_text(name)
    (here / "samples").mkdir(parents=True)
    for name in ("samples/2.txt", "metrics.jsonl", ".lock"):
        (here / name).write_text("old")
    (here / "tokenizer").mkdir()
    (here / "tokenizer" / "old").write_text("old")
    names = ("config.json", "metrics.jsonl", "samples", "tokenizer")
    assert download(f"file://{there}", names, here) == ["config.json", "samples/1.txt"]
    assert not (here / "tokenizer").exists()  # an empty one would look like a saved one
    assert sorted(p.relative_to(here).as_posix() for p in here.rglob("*") if p.is_file()) == [
        ".lock",
        "config.json",
        "samples/1.txt",
    ]


@pytest.mark.parametrize("url", ["s3://bucket/run", "gcs://bucket/run", "GS://bucket/run"])
def test_what_needs_a_folder_or_gs_says_so(url, capsys):
    assert main(["train", "--config=causal_lm", f"--workdir={url}"]) == 1
    assert f"--workdir is '{url}'; it may be a folder" in capsys.readouterr().err
    assert main(["sample", f"--workdir={url}"]) == 1
    assert "or a gs:// URL" in capsys.readouterr().err
    with pytest.raises(UserError, match="the checkpoint's path is"):
        find_checkpoint(url)
    with pytest.raises(UserError, match="the folder of checkpoints is"):
        Checkpointer(url)
    assert not pathlib.Path(url.split("/")[0]).exists()


@pytest.mark.parametrize(
    "command",
    [
        ["ablate", "--config=ablations/ffn", "--workdir=gs://bucket/run"],
        ["replay", "gs://bucket/run", "--step=3"],
        ["inspect", "--workdir=gs://bucket/run"],
        ["context", "--workdir=gs://bucket/run"],
        ["convert", "--from-hf=model", "--workdir=gs://bucket/run"],
        ["convert", "--from-hf=gs://bucket/model", "--workdir=run"],
        ["convert", "--to-hf=gs://bucket/model", "--workdir=gs://bucket/run"],
        ["inspect", "--out=gs://bucket/page", "--workdir=gs://bucket/run"],
        ["context", "--out=gs://bucket/page", "--workdir=gs://bucket/run"],
        ["augment", "--out=gs://bucket/rows", "--method=eda", "--task=sst2"],
        ["sample", "--html=gs://bucket/page.html", "--prompt=a", "--workdir=gs://bucket/run"],
    ],
)
def test_commands_that_write_a_folder_refuse_a_url(command, capsys):
    assert main(command) == 1
    assert "it needs a folder of a file system" in capsys.readouterr().err
    assert not pathlib.Path("gs:").exists()


def test_the_cache_and_the_logs_of_processes_are_in_folders_and_refuse_a_url(monkeypatch, capsys):
    monkeypatch.setenv("GPT_JAX_CACHE", "gs://bucket/cache")
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        for make in (cache_root, use_compilation_cache):
            with pytest.raises(UserError, match="GPT_JAX_CACHE is 'gs://bucket/cache', but it needs a folder"):
                make()
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert launch.main(["--logs=gs://bucket/logs", "--", "true"]) == 1
    assert "--logs is 'gs://bucket/logs', but it needs a folder of a file system" in capsys.readouterr().err
    assert not pathlib.Path("gs:").exists()


def test_compiled_programs_are_in_the_cache_which_may_be_said_by_its_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    before = jax.config.jax_compilation_cache_dir
    for named, place in (("~/kept", tmp_path / "kept"), ("", tmp_path / ".cache" / "gpt_jax")):
        monkeypatch.setenv("GPT_JAX_CACHE", named)
        jax.config.update("jax_compilation_cache_dir", None)
        try:
            use_compilation_cache()
            assert jax.config.jax_compilation_cache_dir == str(place / "xla") and not place.exists()
        finally:
            jax.config.update("jax_compilation_cache_dir", before)
        assert cache_root() == place and place.is_dir()


def test_tasks_read_files_by_url(tmp_path):
    (tmp_path / "t.tsv").write_text("text\tlabel\ngood\tyes\nbad\tno\n")
    task = load_task("classification", train=f"file://{tmp_path}/t.tsv", text="{text}", label="label", hold_out=0)
    assert task.labels == ("no", "yes") and [e.text for e in task.examples("train")] == ["good", "bad"]
    for name, text in (("a.de", "eins\n"), ("a.en", "one\n")):
        (tmp_path / name).write_text(text)
    both = f"file://{tmp_path}/a.de,{tmp_path}/a.en"
    assert load_task("parallel", train=both, hold_out=0).examples("train")[0].target == "one"
    with pytest.raises(UserError, match="file:///.*none.tsv': no such object"):
        load_task("classification", train=f"file://{tmp_path}/none.tsv")


def test_a_store_that_cannot_be_asked_says_nothing_of_a_checkpoint(monkeypatch):
    there = run_folder("gs://bucket/run/checkpoints/4", "a checkpoint")
    with pytest.raises(UserError, match="cannot use 'gs://bucket/run/checkpoints/4': PermissionError: 403") as error:
        checkpoint_folder.refuse_if_unreachable(there, PermissionError("403"))
    assert not isinstance(error.value, checkpoint_folder.DamagedCheckpoint)
    for folder, problem in ((there, FileNotFoundError("gone")), (pathlib.Path("/runs/4"), PermissionError("no"))):
        checkpoint_folder.refuse_if_unreachable(folder, problem)  # damage, which the caller names
    for several, kind in ((False, UserError), (True, RuntimeError)):  # the loss of a process is no mistake of a user
        monkeypatch.setattr("gpt_jax.distributed.several", lambda several=several: several)
        with pytest.raises(kind, match="Connection refused"), reaching(there):
            raise RuntimeError("Connection refused")


def test_without_gcsfs_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs gcsfs: pip install -e '\.\[gcs\]'"):
        run_folder("gs://bucket/run", "--workdir")


def test_an_unknown_scheme_is_a_mistake():
    with pytest.raises(UserError, match="cannot use 'nope://x'"):
        Remote("nope://x")
