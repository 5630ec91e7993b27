"""Corpora stream the same documents whatever the format, and name what is malformed."""

import ast
import csv
import functools
import gzip
import inspect
import io
import json
import lzma
import subprocess
import sys
import types

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from gpt_jax.data import corpora
from gpt_jax.data.corpora import iter_documents, open_corpus
from gpt_jax.data.readers import Progress, expand_paths, read_documents
from gpt_jax.errors import UserError

TEXTS = ["plain", 'two\nlines\tand a "quote", comma\r\n', "naïve 東京 \U0001f600\0", " ", "x" * 3000]
COMPRESS = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: zstandard.ZstdCompressor().compress(data),
}


def jsonl(texts, key="text"):
    return "".join(json.dumps({"id": f"d{i}", key: t}) + "\n" for i, t in enumerate(texts)).encode()


def one_line(error):
    return "\n" not in str(error.value)


SOME = ("json", "csv", "calendar", "this", "turtle", "xml")


@pytest.fixture
def few_modules(monkeypatch):
    """The library as if it had a few modules only: reading it all takes seconds."""
    found = [(n, p) for n, p in corpora.library_files() if n.split(".")[0] in SOME]
    monkeypatch.setattr(corpora, "library_files", lambda: found)


def test_python_docs_is_the_prose_of_this_python_without_duplicates(few_modules):
    docs = dict(iter_documents("python_docs"))
    assert len(set(docs.values())) == len(docs)
    assert docs["json.dumps"] == inspect.getdoc(json.dumps)
    assert docs["csv.Sniffer"] == inspect.getdoc(csv.Sniffer)
    assert docs["csv.Sniffer.sniff"] == inspect.getdoc(csv.Sniffer.sniff)
    assert "topics.lambda" in docs


@pytest.mark.slow
def test_python_docs_is_about_two_megabytes():
    texts = [t for _, t in iter_documents("python_docs")]
    assert 1_500_000 < sum(len(t.encode()) for t in texts) < 5_000_000
    assert len(set(texts)) == len(texts)


def test_python_docs_comes_in_the_same_order_each_time_and_library_modules_are_never_imported():
    code = f"""
import hashlib, json, sys
from gpt_jax.data import corpora
found = [(n, p) for n, p in corpora.library_files() if n.split(".")[0] in {SOME}]
corpora.library_files = lambda: found
docs = list(corpora.iter_documents("python_docs"))
assert any(name.startswith("turtle.") for name, _ in docs)
print(hashlib.sha256(json.dumps(docs).encode()).hexdigest(), "this" in sys.modules, "turtle" in sys.modules)
"""
    run = functools.partial(subprocess.run, [sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, second = (run(env={"PYTHONHASHSEED": seed}).stdout for seed in ("1", "2"))
    assert first == second
    assert first.split()[1:] == ["False", "False"]


def test_python_source_is_the_library_without_tests_and_site_packages():
    source = dict(iter_documents("python_source"))
    assert source["json.encoder"] == inspect.getsource(json.encoder)
    assert not [n for n in source if {"test", "tests", "site-packages"} & set(n.split("."))]
    assert 5_000_000 < sum(map(len, source.values())) < 40_000_000


def test_docstrings_come_with_qualified_names_in_the_order_of_the_text():
    source = """"Module."
class A:
    "Class."
    def f(self):
        "Method."
        def g(): "Inner."
def h(): "Last."
"""
    found = list(corpora.docstrings("m", source))
    assert [(n, t) for n, t, _ in found] == [
        ("m", "Module."),
        ("m.A", "Class."),
        ("m.A.f", "Method."),
        ("m.A.f.g", "Inner."),
        ("m.h", "Last."),
    ]
    assert isinstance(found[2][2], ast.FunctionDef)


def test_fingerprint_names_python_bytes_and_hash_and_is_remembered(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "_read_docs", lambda: iter([("a", "one"), ("b", "naïve")]))
    first = open_corpus("python_docs", memo=tmp_path)
    assert first.fingerprint["bytes"] == 9 and first.fingerprint["documents"] == 2
    assert first.fingerprint["python"] == ".".join(map(str, sys.version_info[:3]))

    def gone():
        raise AssertionError("read again")

    monkeypatch.setattr(corpora, "_read_docs", gone)
    again = open_corpus("python_docs", memo=tmp_path)
    assert again.fingerprint == first.fingerprint
    assert list(again.documents()) == [("a", "one"), ("b", "naïve")]


@pytest.mark.parametrize("compression", COMPRESS)
def test_jsonl_gives_back_every_text(tmp_path, compression):
    path = tmp_path / f"a.jsonl{compression}"
    path.write_bytes(COMPRESS[compression](jsonl(TEXTS)))
    assert list(read_documents(path)) == [(f"d{i}", t) for i, t in enumerate(TEXTS)]


@pytest.mark.parametrize("compression", COMPRESS)
def test_txt_is_one_document_byte_for_byte(tmp_path, compression):
    text = "one\r\ntwo\rthree\u2028four\x85\n\nlast line without end \U0001f600"
    path = tmp_path / f"a.txt{compression}"
    path.write_bytes(COMPRESS[compression](text.encode()))
    assert [t for _, t in read_documents(path)] == [text]


@pytest.mark.parametrize("compression", COMPRESS)
def test_csv_reads_quoted_fields_and_tsv_reads_quotes_as_text(tmp_path, compression):
    out = io.StringIO(newline="")
    csv.writer(out).writerows([["label", "text"], *([i, t] for i, t in enumerate(TEXTS))])
    path = tmp_path / f"a.csv{compression}"
    path.write_bytes(COMPRESS[compression](out.getvalue().encode()))
    assert [t for _, t in read_documents(path)] == TEXTS
    path = tmp_path / f"a.tsv{compression}"
    path.write_bytes(COMPRESS[compression](b'he said "no\t0\n"yes" she said\t1\n'))
    assert [t for _, t in read_documents(path, "0")] == ['he said "no', '"yes" she said']
    assert [t for _, t in read_documents(path, "1")] == ["0", "1"]


def test_parquet_gives_back_every_text(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"n": range(5), "body": TEXTS}), path, row_group_size=2)
    progress = Progress()
    assert [t for _, t in read_documents(path, "body", progress)] == TEXTS
    assert 0 < progress.done <= path.stat().st_size


def test_zst_of_many_frames_is_read_to_its_end(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    data = jsonl(TEXTS)
    path.write_bytes(b"".join(COMPRESS[".zst"](data[i : i + 1000]) for i in range(0, len(data), 1000)))
    assert [t for _, t in read_documents(path)] == TEXTS


def test_reading_streams(tmp_path):
    """The first document is there long before the file is read."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(["x" * 1000] * 3000))
    progress = Progress()
    reader = read_documents(path, progress=progress)
    next(reader)
    assert 0 < progress.done < path.stat().st_size / 5
    assert sum(1 for _ in reader) == 2999
    assert progress.done == path.stat().st_size


def test_long_txt_is_cut_at_line_ends_and_loses_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("gpt_jax.data.readers.LARGEST_DOCUMENT", 100)
    text = "".join(f"line {i}\n" for i in range(200))
    (tmp_path / "a.txt").write_text(text)
    parts = [t for _, t in read_documents(tmp_path / "a.txt")]
    assert "".join(parts) == text and len(parts) > 10
    assert all(p.endswith("\n") and len(p) < 120 for p in parts)


@pytest.mark.parametrize("end", ["", "\n"])
def test_a_line_longer_than_a_document_is_cut_between_characters(tmp_path, monkeypatch, end):
    monkeypatch.setattr("gpt_jax.data.readers.LARGEST_DOCUMENT", 100)
    text = "short\n" + "aé€😀" * 300 + end
    (tmp_path / "a.txt").write_text(text)
    parts = [t for _, t in read_documents(tmp_path / "a.txt")]
    assert "".join(parts) == text and len(parts) > 5
    assert all(len(p.encode()) < 400 for p in parts)
    for broken in (b"\xe2\x82", b"\xff"):
        (tmp_path / "a.txt").write_bytes(text[:300].encode() + broken + end.encode())
        at = len(text[6:300].encode()) + 1
        with pytest.raises(UserError, match=rf"a\.txt:2: not valid UTF-8 \(byte {at} of the line\)"):
            list(read_documents(tmp_path / "a.txt"))


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("text")

    def refuse(path, *mode):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("builtins.open", refuse)  # a superuser may read all
    with pytest.raises(UserError, match=r"a\.txt: cannot read \(Permission denied\)"):
        open_corpus("files", str(tmp_path / "a.txt"), "text")


@pytest.mark.parametrize(
    "name, data, line, says",
    [
        ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', 3, "not JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"body": "b"}\n', 2, "no text under 'text'.*it has body"),
        ("a.jsonl", b'{"text": "a"}\n{"text": 5}\n', 2, "no text under 'text'"),
        ("a.jsonl", b'{"text": "a"}\n["b"]\n', 2, "no text under 'text'"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\\ud800"}\n', 2, "surrogate"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', 2, "not valid UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n' + b"[" * 200_000, 2, "not JSON .maximum recursion"),
        ("a.txt", b"fine\n\xff\n", 2, "not valid UTF-8"),
        ("a.csv", b"text,n\na,1\nb\n", None, None),
        ("a.csv", b"n,text\n1,a\n2\n", 3, "1 columns"),
        ("a.csv", b"body,n\na,1\n", 1, "no column 'text' among body, n"),
        ("a.csv", b'text,n\na,1\nb,"x"y\n', 3, "expected"),
        ("a.tsv", b"body\tn\n", 1, "no column 'text'"),
    ],
)
def test_malformed_line_is_named_with_file_and_line(tmp_path, name, data, line, says):
    path = tmp_path / name
    path.write_bytes(data)
    if line is None:
        assert len(list(read_documents(path))) == 2
        return
    with pytest.raises(UserError, match=rf"{name}:{line}: .*{says}") as error:
        list(read_documents(path))
    assert one_line(error)


@pytest.mark.parametrize("compression", COMPRESS)
def test_a_byte_order_mark_is_no_text(tmp_path, compression):
    mark = "\ufeff"
    for name, content in (
        ("a.txt", f"{mark}é{mark}\n"),
        ("a.jsonl", mark + json.dumps({"text": f"é{mark}\n"})),
        ("a.csv", f'{mark}text\n"é{mark}\n"\n'),
        ("a.tsv", f"{mark}text\té\n é{mark}\t\n"),
    ):
        path = tmp_path / (name + compression)
        path.write_bytes(COMPRESS[compression](content.encode()))
        assert [text.strip() for _, text in read_documents(path)] == [f"é{mark}"]  # only the first is one
    for content in ("", "é"):
        path.write_bytes(COMPRESS[compression](f"text\n{content}".encode()))
        assert [text for _, text in read_documents(path)] == [content] * bool(content)


@pytest.mark.parametrize("compression", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("damage", ["truncated", "overwritten"])
def test_damaged_compressed_file_is_named(tmp_path, compression, damage):
    path = tmp_path / f"a.jsonl{compression}"
    data = COMPRESS[compression](jsonl([str(i**3) for i in range(5000)]))
    data = data[: len(data) // 2] if damage == "truncated" else b"no archive" + data
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf"a.jsonl{compression}: damaged or truncated") as error:
        list(read_documents(path))
    assert one_line(error)


def test_damaged_parquet_and_missing_column_are_named(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": TEXTS}), path)
    with pytest.raises(UserError, match=r"a.parquet: no column 'text' \(it has body\)"):
        list(read_documents(path))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"a.parquet: damaged") as error:
        list(read_documents(path, "body"))
    assert one_line(error)


def test_paths_take_globs_commas_variables_and_each_file_once(tmp_path, monkeypatch):
    for name in ("b.txt", "a.txt", "c.jsonl"):
        (tmp_path / name).write_text("x")
    monkeypatch.setenv("HERE", str(tmp_path))
    found = expand_paths("$HERE/*.txt, ${HERE}/c.jsonl,$HERE/a.txt")
    assert [f.name for f in found] == ["a.txt", "b.txt", "c.jsonl"]
    with pytest.raises(UserError, match="environment variable NOWHERE"):
        expand_paths("$NOWHERE/a.txt")
    with pytest.raises(UserError, match=r"none\.txt': no such file"):
        expand_paths(f"{tmp_path}/none.txt")
    with pytest.raises(UserError, match=r"\*\.md': no such file"):
        expand_paths(f"{tmp_path}/*.md")
    with pytest.raises(UserError, match="is a folder"):
        expand_paths(str(tmp_path))


def test_unknown_corpus_and_format_are_named_with_the_nearest():
    with pytest.raises(UserError, match=r"'python_doc' \(did you mean 'python_docs'\?\)"):
        open_corpus("python_doc")
    with pytest.raises(UserError, match=r"data\.path names none"):
        open_corpus("files")


def test_file_of_unknown_format_and_empty_corpus_are_refused(tmp_path):
    (tmp_path / "a.md").write_text("x")
    with pytest.raises(UserError, match=r"a\.md: cannot tell its format; allowed: \.txt"):
        open_corpus(path=str(tmp_path / "a.md"))
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(UserError, match="holds no text"):
        list(open_corpus(path=str(tmp_path / "a.txt")).documents())


def test_fingerprint_of_files_is_their_content_not_their_place(tmp_path):
    for folder, text in (("a", "same"), ("b", "same"), ("c", "other")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.txt").write_text(text)
    a, b, c = (open_corpus(path=str(tmp_path / f / "x.txt"), memo=tmp_path / "memo").fingerprint for f in "abc")
    assert a == b and a["sha256"] != c["sha256"]
    (tmp_path / "a" / "x.txt").write_text("changed")
    assert open_corpus(path=str(tmp_path / "a" / "x.txt"), memo=tmp_path / "memo").fingerprint["sha256"] != a["sha256"]


def test_hugging_face_dataset_without_the_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"needs the extra 'hf': pip install -e '.\[hf\]'"):
        open_corpus("hf:wikitext")


class Table(list):
    column_names = ("text", "label")
    _fingerprint = "f00d"


def test_hugging_face_dataset_is_read_by_name_config_and_split(monkeypatch):
    """Against a stand-in for the library: what it is asked for, and what its rows become."""
    asked = []

    def load_dataset(name, subset, split):
        asked.append((name, subset, split))
        if name == "nobody/nothing":
            raise FileNotFoundError("no such\ndataset")
        return Table([{"text": "one"}, {"text": None}, {"text": "two"}])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    corpus = open_corpus("hf:a/b:small:test")
    assert [t for _, t in corpus.documents()] == ["one", "two"]
    open_corpus("hf:a/b")
    assert asked == [("a/b", "small", "test"), ("a/b", None, "train")]
    with pytest.raises(UserError, match="'hf:nobody/nothing': no such dataset"):
        open_corpus("hf:nobody/nothing")
    with pytest.raises(UserError, match=r"has no column 'body' \(it has text, label\)"):
        open_corpus("hf:a/b", text_key="body")
