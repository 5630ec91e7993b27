"""What is read out of compiled programs, against programs whose collectives are known."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from gpt_jax import hlo
from gpt_jax.sharding import make_mesh

MESH = dict(fsdp=2, tensor=4)


def program(body, domains=(0,) * 8, length=5):
    """Compiles a scan that runs `body` on a [4, 8] float32 shard `length` times."""
    mesh, spec = make_mesh(MESH), P("fsdp", "tensor")

    def local(x):
        return lax.scan(lambda c, _: (body(c), None), x, None, length=length)[0]

    run = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
    text = run.lower(jax.ShapeDtypeStruct((8, 32), jnp.float32)).compile().as_text()
    return hlo.read_program(text, domains=domains)


SHARD = 4 * 8 * 4  # bytes


@pytest.mark.parametrize(
    ("kind", "body", "group", "sent"),
    [
        ("all-reduce", lambda x: lax.psum(x, "tensor") * 0.1, 4, 2 * SHARD * 3 / 4),
        ("all-gather", lambda x: lax.all_gather(x, "fsdp").sum(0), 2, SHARD),
        (
            "reduce-scatter",
            lambda x: jnp.tile(lax.psum_scatter(x, "tensor", scatter_dimension=1, tiled=True), (1, 4)),
            4,
            SHARD * 3 / 4,
        ),
        ("collective-permute", lambda x: lax.ppermute(x, "fsdp", [(0, 1), (1, 0)]), 2, SHARD),
    ],
)
def test_a_collective_in_a_loop_is_counted_as_often_as_it_runs(kind, body, group, sent):
    found = program(body)
    assert found.unknown_loops == 0
    (one,) = [c for c in found.collectives if c.kind == kind]
    assert (one.count, one.group, one.far) == (5, group, False)
    assert one.bytes == pytest.approx(5 * sent)
    assert hlo.totals(found.collectives)[kind] == {"count": 5, "bytes": pytest.approx(5 * sent)}


def test_a_collective_beyond_its_host_is_told_from_one_within():
    hosts = (0, 0, 0, 0, 1, 1, 1, 1)  # tensor=4 stays within a host, fsdp=2 does not
    within = program(lambda x: lax.psum(x, "tensor") * 0.1, domains=hosts)
    beyond = program(lambda x: lax.psum(x, "fsdp") * 0.1, domains=hosts)
    assert [c.far for c in within.collectives] == [False]
    assert [c.far for c in beyond.collectives] == [True]
    assert [c.beyond for c in beyond.collectives] == [c.bytes for c in beyond.collectives]  # a host's four are in four


@pytest.mark.parametrize(
    ("kind", "hosts", "part"),
    [
        # 16 devices on two hosts: of what a device sends to the fifteen others in turn, one part leaves its host
        ("all-gather", [0] * 8 + [1] * 8, 1 / 15),
        ("all-reduce", [0] * 8 + [1] * 8, 1 / 15),
        ("reduce-scatter", list(range(16)), 1.0),
        ("all-to-all", [0] * 8 + [1] * 8, 8 / 15),
        ("collective-permute", [0, 1], 1.0),
        ("all-gather", [3] * 8, 0.0),
    ],
)
def test_the_devices_of_a_host_share_what_leaves_it(kind, hosts, part):
    assert hlo._beyond(kind, hosts) == pytest.approx(part)


def test_what_leaves_a_host_is_what_its_devices_must_hear_of_the_others():
    """An all-gather by its definition: a host's four devices must receive the four shards of the other host."""
    hosts = (0, 0, 0, 0, 1, 1, 1, 1)
    found = program(lambda x: lax.all_gather(x, ("fsdp", "tensor")).sum(0), domains=hosts)
    (one,) = [c for c in found.collectives if c.kind == "all-gather"]
    assert 4 * one.beyond == pytest.approx(5 * 4 * SHARD) and one.bytes == pytest.approx(5 * 7 * SHARD)


def test_a_loop_over_stacked_weights_reads_each_once_and_not_the_stack_each_time():
    def run(w, x):
        return lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, w)[0]

    layers, size = 16, 256
    shapes = jax.ShapeDtypeStruct((layers, size, size), jnp.float32), jax.ShapeDtypeStruct((8, size), jnp.float32)
    text = jax.jit(run).lower(*shapes).compile().as_text()
    found = hlo.read_program(text, domains=(0,))
    stack = layers * size * size * 4
    assert stack <= found.memory_bytes <= 4 * stack  # read, perhaps by way of a copy; not 16 times
    assert not found.collectives


TEXT = """HloModule jit_f

%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %p = (s32[]{:T(128)}, f32[4]{0:T(128)}) parameter(0)
  %x = f32[4]{0:T(128)} get-tuple-element(%p), index=1
  %ag.1 = f32[16]{0:T(128)S(1)} all-gather(%x), channel_id=7, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
  %k = f32[4]{0:T(128)} custom-call(%x), custom_call_target="tpu_custom_call", frontend_attributes={kernel={
 "metadata":"{\\"block\\": 512}"
}}, metadata={op_name="kernel"}
  %f = f32[4]{0:T(128)} fusion(%k), kind=kCustom, calls=%spread
  ROOT %t = (s32[]{:T(128)}, f32[4]{0:T(128)}) tuple(%p, %f)
}

%spread (q: f32[4]) -> f32[4] {
  %q = f32[4]{0:T(128)} parameter(0)
  %ag.2 = f32[16]{0:T(128)S(1)} all-gather(%q), channel_id=7, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
  ROOT %n = f32[4]{0:T(128)} negate(%q)
}

%condition (c: (s32[], f32[4])) -> pred[] {
  %limit = s32[]{:T(128)} constant(12)
  %c = (s32[]{:T(128)}, f32[4]{0:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

ENTRY %main (a: (s32[], f32[4])) -> (s32[], f32[4]) {
  %a = (s32[]{:T(128)}, f32[4]{0:T(128)}) parameter(0)
  ROOT %w = (s32[]{:T(128)}, f32[4]{0:T(128)}) while(%a), condition=%condition, body=%body
}
"""


def test_a_tpu_program_says_its_trips_by_its_condition_and_spreads_one_collective_over_fusions():
    found = hlo.read_program(TEXT, domains=(0, 1) * 4)
    (one,) = found.collectives
    assert (one.kind, one.count, one.group, one.far) == ("all-gather", 12, 4, False)  # devices 0, 2, 4, 6 and 1, 3, ...
    assert one.bytes == 12 * 3 * 16


def test_a_loop_whose_condition_is_a_fusion_says_its_trips_there():
    fused = """%compare (i: s32[]) -> pred[] {
  %i = s32[] parameter(0)
  %three = s32[] constant(3)
  ROOT %less = pred[] compare(%i, %three), direction=LT
}

%condition (c: (s32[], f32[4])) -> pred[] {
  %c = (s32[], f32[4]{0}) parameter(0)
  %at = s32[] get-tuple-element(%c), index=0
  ROOT %go_on = pred[] fusion(%at), kind=kLoop, calls=%compare
}
"""
    start, end = TEXT.index("%condition ("), TEXT.index("ENTRY")
    found = hlo.read_program(f"{TEXT[:start]}{fused}\n{TEXT[end:]}", domains=(0,) * 8, trips=99)
    assert found.unknown_loops == 0 and [c.count for c in found.collectives] == [3]


def test_what_a_host_sends_to_other_slices_is_beyond_the_slice():
    head, tail = TEXT.split("  %f = f32[4]")
    send = (
        "  %after = token[] after-all()\n  %s = (f32[4]{0:T(128)}, u32[], token[]) send(%x, %after), channel_id=3, "
        'is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}\n'
    )
    found = hlo.read_program(f"{head}{send}  %f = f32[4]{tail}", domains=(0, 1) * 4)
    (one,) = [c for c in found.collectives if c.far]
    assert (one.kind, one.count, one.bytes) == ("send to other slices", 12, 12 * 16)


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}, x", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[4], x", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0), x", [[0, 2], [1, 3]]),
        ("source_target_pairs={{0,1},{1,0}}, x", [[0, 1], [1, 0]]),
        ("replica_groups=mesh['a'=2,'b'=1,'c'=2] {'a'}, x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}, x", [[0, 1, 2, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(2)2}, x", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(1)2}, x", [[0, 2], [1, 3]]),
        ("replica_groups={}, x", []),
    ],
)
def test_groups_of_devices_are_read_in_every_spelling(text, groups):
    assert hlo._groups(text) == groups
