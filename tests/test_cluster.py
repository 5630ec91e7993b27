"""Which process of how many this is, as each scheduler says it, and the roll call before a job starts."""

import json
import socket
import threading
import time

import pytest

from gpt_jax.cluster import Place, find_place, first_host
from gpt_jax.errors import Unavailable, UserError
from gpt_jax.launch import free_port
from gpt_jax.rollcall import call_roll, differing

LAUNCHED = {"GPT_JAX_COORDINATOR": "host:1234", "GPT_JAX_NUM_PROCESSES": "4", "GPT_JAX_PROCESS_ID": "2"}
SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NODELIST": "gpu[07-09,12],login1",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "1(x5)",
}
GKE = {"TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "a.svc,b.svc"}


def no_metadata(key):
    raise AssertionError(f"asked for {key}")


def place(environ, metadata=no_metadata, tpu=False):
    return find_place(environ, metadata=metadata, tpu_machine=tpu)


def test_a_plain_machine_is_one_process():
    assert place({}) is None
    assert place({"GPT_JAX_NUM_PROCESSES": "1"}) is None
    assert place(SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) is None
    # The batch script itself, outside srun: the job's variables are there, the step's are not.
    assert place({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}) is None


def test_the_launchers_variables_come_before_the_schedulers():
    assert place(LAUNCHED | SLURM) == Place("host:1234", 4, 2, "GPT_JAX_NUM_PROCESSES")


def test_slurm_has_the_first_host_and_a_port_of_the_job():
    found = place(SLURM)
    assert (found.coordinator, found.processes, found.index) == ("gpu07:61441", 5, 3)
    assert found.local_devices is None  # one task per node drives all its devices
    several = SLURM | {"SLURM_STEP_TASKS_PER_NODE": "2(x2),1", "SLURM_LOCALID": "1"}
    assert place(several).local_devices == (1,)
    assert place(several | {"CUDA_VISIBLE_DEVICES": "5"}).local_devices is None  # its own one already


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n1", "n1"), ("n1,n2", "n1"), ("n[01-04]", "n01"), ("n[3,7],m1", "n3"), ("r[1-2]-x,b", "r1-x")],
)
def test_first_host_of_a_node_list(nodes, first):
    assert first_host(nodes) == first


def test_gke_counts_hosts_and_slices():
    assert place(GKE, tpu=True) == Place("a.svc:8482", 2, 1, "TPU_WORKER_HOSTNAMES")
    slices = {
        "MEGASCALE_NUM_SLICES": "3",
        "MEGASCALE_SLICE_ID": "2",
        "MEGASCALE_COORDINATOR_ADDRESS": "c.svc:8080",
    }
    assert place(GKE | slices, tpu=True) == Place("c.svc:8482", 6, 5, "TPU_WORKER_HOSTNAMES")
    assert place(GKE, tpu=False) is None


@pytest.mark.parametrize("hosts", ["10.0.0.1,10.0.0.2", "x:0:10.0.0.1,x:1:10.0.0.2"])
def test_a_cloud_tpu_asks_its_metadata(hosts):
    answers = {
        "worker-network-endpoints": hosts,
        "agent-worker-number": "1",
        "tpu-env": "ZONE: 'z'\nMEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\n"
        "MEGASCALE_COORDINATOR_ADDRESS: '10.0.9.9'",
    }
    found = place({}, answers.get, tpu=True)
    assert (found.coordinator, found.processes, found.index) == ("10.0.9.9:8482", 4, 3)
    del answers["tpu-env"]
    found = place({}, answers.get, tpu=True)
    assert (found.coordinator, found.processes, found.index) == ("10.0.0.1:8482", 2, 1)
    assert place({}, {}.get, tpu=True) is None
    assert place({"TPU_SKIP_MDS_QUERY": "1"}, tpu=True) is None


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"GPT_JAX_PROCESS_ID": "1"}, "GPT_JAX_COORDINATOR and GPT_JAX_NUM_PROCESSES is not"),
        (LAUNCHED | {"GPT_JAX_PROCESS_ID": "4"}, "GPT_JAX_PROCESS_ID is 4; of 4 processes the last is 3"),
        (LAUNCHED | {"GPT_JAX_NUM_PROCESSES": "four"}, "GPT_JAX_NUM_PROCESSES is 'four'; it is a whole number from 1"),
        (LAUNCHED | {"GPT_JAX_COORDINATOR": "host"}, "GPT_JAX_COORDINATOR is 'host'; it is HOST:PORT"),
        (
            LAUNCHED | {"GPT_JAX_COORDINATOR": "host:0"},
            "'host:0'; it is HOST:PORT of process 0, a port from 1 to 65535",
        ),
        (LAUNCHED | {"GPT_JAX_COORDINATOR": "host:65536"}, "GPT_JAX_COORDINATOR is 'host:65536'; it is HOST:PORT"),
        (SLURM | {"SLURM_PROCID": "x"}, "SLURM_PROCID is 'x'"),
    ],
)
def test_contradictions_are_named(environ, message):
    with pytest.raises(UserError, match=message):
        place(environ)


# ---- the roll call


def roll(members, seconds=20.0, processes=None, port=None):
    """Runs the processes as threads; returns their errors by process."""
    port = port or free_port()
    total = processes or len(members)
    errors = {}

    def one(key, index, announced, facts):
        try:
            call_roll(Place(f"127.0.0.1:{port}", announced, index, "test"), facts, seconds)
        except UserError as error:
            errors[key] = error

    threads = [
        threading.Thread(target=one, args=(key, index, announced or total, facts))
        for key, (index, announced, facts) in enumerate(members)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def test_all_come_and_agree():
    assert not roll([(k, None, {"code": "a"}) for k in range(4)])


def test_the_odd_process_is_named_to_all():
    errors = roll([(k, None, {"code": "b" if k == 2 else "a"}) for k in range(4)])
    assert len(errors) == 4 and len({str(e) for e in errors.values()}) == 1
    assert str(errors[0]).startswith("code differs: process 2 on ") and '"b", the others have "a"' in str(errors[0])
    assert errors[0].exit_code == 1


def test_process_0_itself_may_be_the_odd_one():
    errors = roll([(k, None, {"code": "b" if k == 0 else "a"}) for k in range(4)])
    assert "code differs: process 0 on " in str(errors[3])


def test_too_few_processes_end_in_time_and_are_counted():
    began = time.monotonic()
    errors = roll([(0, None, {}), (3, None, {})], seconds=1.0, processes=4)
    assert time.monotonic() - began < 5
    assert len(errors) == 2
    for error in errors.values():
        assert str(error) == "2 of 4 processes came within 1 s; missing: 1, 2."
        assert isinstance(error, Unavailable) and error.exit_code == 75


def test_without_process_0_the_others_end_in_time():
    errors = roll([(1, None, {})], seconds=0.5, processes=2)
    assert "process 1 of 2 (test) could not reach process 0" in str(errors[0]) and errors[0].exit_code == 75


def test_two_of_the_same_number_and_another_count_are_named():
    errors = roll([(0, None, {}), (1, None, {}), (1, None, {})], processes=3, seconds=5)
    assert any("two processes say that they are process 1" in str(e) for e in errors.values())
    errors = roll([(0, 2, {}), (1, 8, {})], seconds=5)
    assert "was told of 8 processes, process 0 of 2." in str(errors[0])


def test_strangers_at_the_port_are_no_processes():
    port, errors = free_port(), {}
    job = threading.Thread(
        target=lambda: errors.update(roll([(0, None, {})], seconds=8, processes=2, port=port)), daemon=True
    )
    job.start()
    for words in (b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b'{"process": "x"}\n', b""):
        for _ in range(100):
            try:
                with socket.create_connection(("127.0.0.1", port)) as stranger:
                    stranger.sendall(words)
                    break
            except OSError:
                time.sleep(0.02)
    late = roll([(1, None, {})], seconds=8, processes=2, port=port)
    job.join()
    assert not late and not errors


def test_of_equally_many_the_one_that_differs_from_process_0_is_odd():
    entries = [{"process": k, "host": f"h{k}", "facts": {"x": k}} for k in range(2)]
    assert json.dumps(differing(entries)).count("process 1 on 'h1' has 1, the others have 0") == 1
    entries[1]["facts"] = "not facts"
    assert "process 1 on 'h1' has null" in differing(entries)["error"]
