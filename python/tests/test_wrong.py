"""Wrong calls are errors that say what to do; and what the stubs say is there."""

import ast
import inspect
import io
import pickle
from pathlib import Path

import pytest
from conftest import BLOCK, blocks, chain, layout

import kvkeep
from kvkeep import _native

# Each call is wrong by itself; what its error says.
WRONG = {
    "joined keys": (lambda ns: ns.match(b"x" * 33, key_len=32), kvkeep.Error, "key_len"),
    "keys as bytes": (lambda ns: ns.match(b"x" * 32), kvkeep.Error, "key_len"),
    "keys as text": (lambda ns: ns.match(["x"]), TypeError, "bytes-like"),
    "long key": (lambda ns: ns.match([b"x" * 129]), kvkeep.Error, "128"),
    "long request id": (lambda ns: kvkeep.Call(b"x" * 65), kvkeep.Error, "64 bytes"),
    "places": (lambda ns: ns.get_into(chain(2), blocks(1)), kvkeep.Error, "per item"),
    "no blocks": (
        lambda ns: ns.get_into(chain(1), kvkeep.Geometry([(bytearray(BLOCK), BLOCK)], 1)),
        kvkeep.Error,
        "block ids",
    ),
    "blocks without geometry": (lambda ns: ns.get_into(chain(1), blocks(1), [0]), kvkeep.Error, "geometry"),
    "block id": (
        lambda ns: ns.get_into(chain(1), kvkeep.Geometry([(bytearray(BLOCK), BLOCK)], 1), [1]),
        kvkeep.Error,
        "no such block",
    ),
    "address": (lambda ns: ns.get_into(chain(1), [(0, BLOCK)]), kvkeep.Error, "address"),
    "a step": (lambda ns: ns.put_from(chain(1), [memoryview(bytearray(BLOCK))[::2]]), BufferError, "contiguous"),
    "parts": (lambda ns: ns.get_into(chain(2), blocks(2), parts=[[(0, 0)]]), kvkeep.Error, "per key"),
    "parts of nobody": (lambda ns: ns.get_into(chain(1), blocks(1), parts=[0]), TypeError, "group, shard"),
    "class": (lambda ns: ns.put_from(chain(1), blocks(1), cls="forever"), ValueError, "durable"),
    "time": (lambda ns: ns.match(chain(1), lease=-1), ValueError, "seconds"),
    "kind": (lambda ns: kvkeep.RequestInfo("poem"), ValueError, "subagent"),
    "queue": (lambda ns: ns.poll(7), kvkeep.Error, "no such queue"),
    "fault": (lambda ns: ns.inject("flood"), ValueError, "silent"),
    "endpoint": (lambda ns: kvkeep.Client("ftp://host"), kvkeep.Error, "endpoint"),
    "local": (lambda ns: kvkeep.Client("local:/kv?drum=1GiB"), kvkeep.Error, "dram"),
    "way": (lambda ns: kvkeep.Client(way="pigeon"), ValueError, "grpc"),
    "queues": (lambda ns: kvkeep.Client().namespace("n", layout(), "w", queues=17), kvkeep.Error, "16 queues"),
    "size": (lambda ns: kvkeep.Group(16, ("about", 5)), TypeError, "up_to"),
    "rule": (lambda ns: kvkeep.Group(16, BLOCK, rule="some"), TypeError, "window"),
    "format": (lambda ns: layout(block=1), kvkeep.Error, "1 KiB"),
    "region": (lambda ns: kvkeep.Region.open("/nowhere/at/all"), FileNotFoundError, "nowhere|No such file"),
    "descriptor": (lambda ns: kvkeep.Region.from_fd(-1), ValueError, "descriptor"),
    "token ids": (lambda ns: ns.put_from(chain(2), blocks(2), token_ids=[[1]]), kvkeep.Error, "per key"),
    "closed": (lambda ns: [ns.close(), ns.match(chain(1))], kvkeep.Error, "closed"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_call_is_told_what_is_wrong(ns, what):
    call, kind, says = WRONG[what]
    with pytest.raises(kind, match=says) as error:
        call(ns)
    if kind is kvkeep.Error:
        e = error.value
        assert e.kind in ("invalid_argument", "config", "wrong_size", "too_large"), e
        assert e.message and e.retryable is False and e.retry_after is None and isinstance(e.context, dict)


def test_another_format_under_the_same_name_is_refused(server):
    with server.namespace() as ns:
        name = ns.name
        assert ns.format == layout() and ns.format != layout(2 * BLOCK) and ns.format != 1
        assert ns.format.differences(layout(2 * BLOCK)) == ["groups[0].size"]
        assert ns.format.fingerprint == layout().fingerprint and hash(ns.format) == hash(layout())
    with server.client().namespace(name, layout(2 * BLOCK), "weights") as other:
        with pytest.raises(kvkeep.Error) as error:
            other.ready(30)
        assert error.value.kind == "format_mismatch"


def test_objects_are_made_anew_in_another_process_and_not_sent(ns):
    for thing in (ns, ns.format, kvkeep.Region(4096), kvkeep.Call()):
        with pytest.raises(TypeError):
            pickle.dumps(thing)


def test_a_namespace_is_closed_once_and_for_all(server):
    ns = server.namespace()
    ns.close()
    ns.close()
    assert ns.closed and repr(ns) == "Namespace(closed)"


def test_doctor_says_what_is_there_and_what_to_do(server, tmp_path):
    said = io.StringIO()
    assert kvkeep.doctor(server.endpoint, timeout=30, file=said)
    assert "straight into regions" in said.getvalue() and kvkeep.__version__ in said.getvalue()
    said = io.StringIO()
    assert not kvkeep.doctor(f"unix:{tmp_path}/s", timeout=0.1, file=said)
    assert "start kvkeepd" in said.getvalue()
    said = io.StringIO()
    assert not kvkeep.doctor("ftp://host", file=said)
    assert "wrong" in said.getvalue()


def test_the_stubs_say_what_there_is():
    stubs = ast.parse(Path(kvkeep.__file__).with_name("_native.pyi").read_text())
    classes = {node.name: node for node in stubs.body if isinstance(node, ast.ClassDef)}
    there = {name for name, value in vars(_native).items() if inspect.isclass(value)}
    assert set(classes) == there
    for name, node in classes.items():
        cls = getattr(_native, name)
        said = {n.name for n in node.body if isinstance(n, ast.FunctionDef) and not n.name.startswith("__")}
        said |= {n.target.id for n in node.body if isinstance(n, ast.AnnAssign)}
        public = {n for n in vars(cls) if not n.startswith("_")}
        if name != "Error":  # its attributes are set on each
            assert said == public, name
        for function in node.body:
            if isinstance(function, ast.FunctionDef) and not function.decorator_list:
                _same_arguments(name, cls, function)
    values = {n.target.id for n in stubs.body if isinstance(n, ast.AnnAssign)} - {
        "_Bytes", "_List", "Keys", "Parts", "PlaceLike", "Places", "BlockIds", "Tier", "Class",
    }  # fmt: skip
    assert values == {n for n in vars(_native) if not inspect.isclass(getattr(_native, n))} - {
        "__name__", "__doc__", "__package__", "__loader__", "__spec__", "__file__", "__all__", "_after_fork", "_close_all",
    }  # fmt: skip


def _same_arguments(name: str, cls: type, function: ast.FunctionDef) -> None:
    """A function's names of arguments, and which of them are keywords only, as the module has them."""
    if function.name == "__new__":
        signature = inspect.signature(cls)
    elif function.name.startswith("__"):
        return
    else:
        signature = inspect.signature(getattr(cls, function.name))
    said = function.args
    ours = (
        [a.arg for a in said.posonlyargs + said.args if a.arg not in ("self", "cls")],
        [a.arg for a in said.kwonlyargs],
    )
    kinds = signature.parameters.values()
    theirs = (
        [p.name for p in kinds if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.name != "self"],
        [p.name for p in kinds if p.kind is p.KEYWORD_ONLY],
    )
    assert ours == theirs, f"{name}.{function.name}"
