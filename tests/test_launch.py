"""The launcher, with processes that are a line of Python each."""

import errno
import io
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

import pytest

from gpt_jax.launch import describe, first_cause, hold, launch, main, pass_on

ME = "import os, sys, time, signal; k = int(os.environ['GPT_JAX_PROCESS_ID']); "


def python(text, **options):
    return launch([sys.executable, "-c", ME + text], **options)


def test_processes_are_told_their_place_and_pass_their_output_on(capfd):
    code = python(
        "print('I am', k, 'of', os.environ['GPT_JAX_NUM_PROCESSES'], os.environ['GPT_JAX_COORDINATOR'][:10])",
        processes=3,
    )
    assert code == 0
    out = capfd.readouterr().out.splitlines()
    assert sorted(out) == [
        "I am 0 of 3 127.0.0.1:",
        "[1] I am 1 of 3 127.0.0.1:",
        "[2] I am 2 of 3 127.0.0.1:",
    ]


def test_a_killed_process_is_named_the_others_end_and_the_code_is_75(capfd):
    began = time.monotonic()
    code = python("os.kill(os.getpid(), signal.SIGKILL) if k == 2 else time.sleep(600)", processes=4)
    assert code == 75 and time.monotonic() - began < 30
    err = capfd.readouterr().err.strip()
    assert err.startswith("gpt_jax.launch: process 2 of 4 (pid ") and "\n" not in err
    assert err.endswith(") was lost: killed by SIGKILL; the other 3 ended with it.")


def test_a_mistake_is_never_tried_again(tmp_path, capfd):
    code = python(f"open({str(tmp_path / 'starts')!r}, 'a').write('x'); sys.exit(1)", processes=1, restarts=5,
                  environ=os.environ | {"GPT_JAX_PROCESS_ID": "0"})  # fmt: skip
    assert code == 1 and (tmp_path / "starts").read_text() == "x"
    assert "process 0 of 1 failed with exit code 1." in capfd.readouterr().err


def test_a_mistake_of_one_ends_the_others_that_wait(capfd):
    assert python("sys.exit(3) if k == 1 else time.sleep(600)", processes=2, restarts=2) == 3
    assert "process 1 of 2 failed with exit code 3; the other 1 ended with it." in capfd.readouterr().err


def test_75_is_tried_again_as_often_as_allowed(tmp_path, capfd):
    starts = str(tmp_path / "starts")
    again = f"open({starts!r}, 'a').write('x'); n = len(open({starts!r}).read()); "
    environ = os.environ | {"GPT_JAX_PROCESS_ID": "0"}
    assert python(again + "sys.exit(75 if n < 3 else 0)", restarts=5, environ=environ, pause=0) == 0
    assert (tmp_path / "starts").read_text() == "xxx"
    assert "4 restarts left" in capfd.readouterr().err
    os.remove(starts)
    assert python(again + "sys.exit(75)", restarts=2, environ=environ, pause=0) == 75
    assert (tmp_path / "starts").read_text() == "xxx"


def test_those_that_the_runtime_aborts_are_not_named():
    aborted, killed = (0, -signal.SIGABRT), (3, -signal.SIGKILL)
    assert first_cause([aborted, (1, 134), killed]) == killed
    assert first_cause([aborted, (2, 1)]) == (2, 1)  # a mistake that another followed
    assert first_cause([(2, 1), killed]) == killed  # a loss that another stumbled over
    assert first_cause([(0, 75), aborted]) == aborted
    assert describe(-9) == describe(137) == "killed by SIGKILL" and describe(3) == "exit code 3"


def test_a_file_per_process_and_the_terminal_has_process_0(tmp_path, capfd):
    assert python("print('hello', k); print('oh', k, file=sys.stderr)", processes=2, logs=tmp_path) == 0
    said = capfd.readouterr()
    assert (said.out, said.err) == ("hello 0\n", "oh 0\n")
    assert sorted((tmp_path / "process_1.log").read_text().splitlines()) == ["hello 1", "oh 1"]


class Full(io.BytesIO):
    """A file on a full disk."""

    def flush(self):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_under_the_log_keeps_no_line_from_the_terminal():
    shown = io.StringIO()
    pass_on(io.BytesIO(b"one\ntwo\n"), shown, Full(), "[1] ")
    assert shown.getvalue() == "[1] one\n[1] two\n"
    log, closed = io.BytesIO(), io.TextIOWrapper(Full(), "ascii")
    pass_on(io.BytesIO("one\nä\nthree\n".encode()), closed, log, "")
    assert log.getvalue().decode() == "one\nä\nthree\n"


def test_a_process_whose_output_nobody_reads_any_more_finishes(tmp_path):
    """As after a lost connection: more than a pipe holds, on both streams, and the launcher has a word to say."""
    child = "import sys; [print('x' * 99, file=f) for f in (sys.stdout, sys.stderr) for _ in range(3000)]; sys.exit(3)"
    command = ["-m", "gpt_jax.launch", "--logs", str(tmp_path), "--", sys.executable, "-c", child]
    read, write = os.pipe()
    os.close(read)
    environ = {key: value for key, value in os.environ.items() if key != "GPT_JAX_PROCESS_ID"}
    try:
        done = subprocess.run([sys.executable, *command], env=environ, stdout=write, stderr=write, timeout=60)
    finally:
        os.close(write)
    assert done.returncode == 3
    assert len((tmp_path / "process_0.log").read_bytes()) == 2 * 3000 * 100


def test_sigterm_goes_to_the_processes_and_no_restart_follows(tmp_path):
    child = ME + (
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); "
        f"open({str(tmp_path)!r} + f'/{{k}}', 'a').write('x'); time.sleep(600)"
    )
    command = ["-m", "gpt_jax.launch", "--processes", "2", "--restarts", "3", "--", sys.executable, "-c", child]
    process = subprocess.Popen([sys.executable, *command], env=os.environ)
    while len([p for p in tmp_path.iterdir() if p.read_text()]) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 75
    assert [(tmp_path / k).read_text() for k in "01"] == ["x", "x"]


def is_alive(pid):
    """Whether a process runs; one that has ended and nobody has waited for does not."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="reads /proc")
def test_what_a_process_has_started_ends_with_the_job(tmp_path):
    """Of the lost process as well as of the one that is ended with it: else it runs beside the next attempt."""
    script = f"sleep 600 & echo $! > {tmp_path}/$GPT_JAX_PROCESS_ID; while [ ! -s {tmp_path}/0 -o ! -s {tmp_path}/1 ]; "
    script += "do sleep 0.05; done; if [ $GPT_JAX_PROCESS_ID = 0 ]; then kill -9 $$; fi; wait"
    assert launch(["bash", "-c", script], processes=2) == 75
    end = time.monotonic() + 5
    while any(is_alive((tmp_path / k).read_text().strip()) for k in "01"):
        assert time.monotonic() < end
        time.sleep(0.01)


def test_what_a_shell_has_started_is_told_once_to_save_and_has_time_to(tmp_path):
    """A shell ends at once when it is told, and what it waited for would not hear of it."""
    child = f"import pathlib, signal, sys, time; here = pathlib.Path({str(tmp_path)!r}); told = []\n"
    child += "signal.signal(signal.SIGTERM, lambda *_: told.append(1)); (here / 'up').touch()\n"
    child += "while not told: time.sleep(0.01)\n"
    child += "time.sleep(0.5); (here / 'saved').write_text(str(len(told)))"
    script = f"{shlex.quote(sys.executable)} -c {shlex.quote(child)}; true"
    process = subprocess.Popen([sys.executable, "-m", "gpt_jax.launch", "--restarts=3", "--", "bash", "-c", script])
    while not (tmp_path / "up").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 75
    assert (tmp_path / "saved").read_text() == "1"


def test_a_log_that_cannot_be_written_leaves_nothing_running(tmp_path, capfd):
    (tmp_path / "file").touch()
    logs = tmp_path / "logs" / "process_1.log"
    logs.mkdir(parents=True)  # only the second process finds its file in the way
    script = f"touch {tmp_path}/started; sleep 600"
    began = time.monotonic()
    for folder, strerror in ((tmp_path / "file", "File exists"), (logs.parent, "Is a directory")):
        assert main(["--processes=2", f"--logs={folder}", "--", "bash", "-c", script]) == 1
        said = f"gpt_jax.launch: --logs is {str(folder)!r}, which cannot be written: {strerror}.\n"
        assert capfd.readouterr().err == said
    assert time.monotonic() - began < 30


def started(tmp_path, at_sigterm):
    """A launcher that holds `tmp_path / "held"`, of a process that has written its number."""
    child = (
        f"import os, pathlib, signal, sys, time; here = pathlib.Path({str(tmp_path)!r}); "
        f"signal.signal(signal.SIGTERM, lambda *_: {at_sigterm}); "
        "(here / 'new').write_text(str(os.getpid())); os.rename(here / 'new', here / 'child'); time.sleep(600)"
    )
    command = ["-m", "gpt_jax.launch", "--restarts", "3", "--alone", str(tmp_path / "held"), "--"]
    process = subprocess.Popen([sys.executable, *command, sys.executable, "-c", child], stderr=subprocess.DEVNULL)
    while not (tmp_path / "child").exists():
        assert process.poll() is None
        time.sleep(0.05)
    return process


def test_a_launcher_that_a_lost_connection_left_saves_and_ends_before_the_next_starts(tmp_path, capfd):
    left = started(tmp_path, "(here / 'saved').touch() or sys.exit(75)")
    ended = f"import os, sys; sys.exit(not os.path.exists({str(tmp_path / 'saved')!r}))"
    assert main(["--alone", str(tmp_path / "held"), "--", sys.executable, "-c", ended]) == 0
    assert left.wait(timeout=10) == 75
    assert f"another launcher (pid {left.pid}) runs here: SIGTERM" in capfd.readouterr().err
    assert main(["--alone", str(tmp_path / "held"), "--", "true"]) == 0  # held by none
    assert not capfd.readouterr().err


def test_a_launcher_whose_process_does_not_end_is_ended_with_it(tmp_path):
    left = started(tmp_path, "None")
    with hold(tmp_path / "held", grace=0.2):
        assert left.wait(timeout=10) == 75
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / "child").read_text()), 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--processes", "2"], "no command"),
        (["--processes", "0", "--", "true"], "--processes is 0"),
        (["--alone", "/nonexistent/file", "--", "true"], "--alone is '/nonexistent/file', which cannot be written"),
        (["--", "/nonexistent/command"], "cannot start '/nonexistent/command'"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capfd):
    assert main(arguments) == 1
    assert message in capfd.readouterr().err
