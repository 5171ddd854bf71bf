"""Pickles that would do something are refused by the name of what they would call, wherever it stands, and
nothing runs."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from registry.core.errors import InvalidInput, UnsafePickle
from registry.formats.pickles import PickleFile, read_pickle_bytes, read_pickle_file
from tests.formats.pickles import assembler as asm
from tests.formats.pickles.observer import nothing_runs

CANARY = "touch canary; echo x > canary"

CALLS: list[tuple[str, str, tuple[object, ...]]] = [
    ("os", "system", (CANARY,)),
    ("posix", "system", (CANARY,)),
    ("nt", "system", (CANARY,)),
    ("os", "popen", (CANARY,)),
    ("os", "execv", ("/bin/sh", ["sh"])),
    ("os", "putenv", ("CANARY", "1")),
    ("os", "remove", ("canary",)),
    ("subprocess", "Popen", (["touch", "canary"],)),
    ("subprocess", "run", (["touch", "canary"],)),
    ("subprocess", "check_output", (["touch", "canary"],)),
    ("commands", "getoutput", (CANARY,)),
    ("builtins", "eval", ("open('canary', 'w')",)),
    ("__builtin__", "eval", ("open('canary', 'w')",)),
    ("builtins", "exec", ("open('canary', 'w')",)),
    ("builtins", "compile", ("1", "canary", "exec")),
    ("builtins", "open", ("canary", "w")),
    ("builtins", "__import__", ("antigravity",)),
    ("builtins", "getattr", (asm.name("os", "path"), "join")),
    ("__builtin__", "getattr", (asm.name("os", "path"), "join")),
    ("builtins", "setattr", (asm.name("os", "path"), "canary", 1)),
    ("builtins", "delattr", (asm.name("os", "path"), "join")),
    ("builtins", "map", (asm.name("os", "system"), [CANARY])),
    ("builtins", "filter", (asm.name("os", "system"), [CANARY])),
    ("builtins", "apply", (asm.name("os", "system"), (CANARY,))),
    ("builtins", "type", ("Canary", (), {})),
    ("builtins", "super", ()),
    ("builtins", "globals", ()),
    ("builtins", "vars", ()),
    ("builtins", "input", ("canary",)),
    ("builtins", "breakpoint", ()),
    ("builtins", "memoryview", (b"canary",)),
    ("builtins", "set.__class__", ("Canary", (), {})),
    ("builtins", "dict.fromkeys", ([1],)),
    ("collections", "OrderedDict.fromkeys", ([1],)),
    ("collections", "namedtuple", ("Canary", "a")),
    ("functools", "partial", (asm.name("os", "system"), CANARY)),
    ("functools", "reduce", (asm.name("os", "system"), [CANARY, ""])),
    ("operator", "methodcaller", ("system", CANARY)),
    ("operator", "attrgetter", ("system",)),
    ("operator", "itemgetter", (0,)),
    ("_operator", "attrgetter", ("system",)),
    ("itertools", "starmap", (asm.name("os", "system"), [(CANARY,)])),
    ("importlib", "import_module", ("antigravity",)),
    ("runpy", "run_path", ("canary.py",)),
    ("runpy", "_run_code", ("x", {})),
    ("code", "interact", ()),
    ("pty", "spawn", ("/bin/sh",)),
    ("pdb", "run", (CANARY,)),
    ("timeit", "timeit", (CANARY,)),
    ("cProfile", "run", (CANARY,)),
    ("socket", "socket", ()),
    ("socket", "create_connection", (("localhost", 1),)),
    ("urllib.request", "urlopen", ("http://localhost/",)),
    ("http.client", "HTTPConnection", ("localhost",)),
    ("smtplib", "SMTP", ("localhost",)),
    ("webbrowser", "open", ("http://localhost/",)),
    ("shutil", "rmtree", ("canary",)),
    ("tempfile", "mktemp", ()),
    ("ctypes", "CDLL", ("libc.so.6",)),
    ("types", "CodeType", (0, 0, 0, 0, 0, b"", (), (), (), "", "", 0, b"")),
    ("types", "FunctionType", (None, {})),
    ("marshal", "loads", (b"N",)),
    ("pickle", "loads", (b"N.",)),
    ("_pickle", "loads", (b"N.",)),
    ("pickle", "Unpickler", (None,)),
    ("dill", "loads", (b"N.",)),
    ("dill._dill", "_create_code", (0,)),
    ("dill._dill", "_create_function", (None, {})),
    ("dill._dill", "_create_type", (None, "Canary")),
    ("dill._dill", "_import_module", ("os.system",)),
    ("dill._dill", "_eval_repr", ("open('canary', 'w')",)),
    ("dill._dill", "_get_attr", (None, "system")),
    ("dill._dill", "_load_type", ("CodeType",)),
    ("dill.dill", "_load_type", ("FunctionType",)),
    ("cloudpickle.cloudpickle", "_make_function", (None,)),
    ("joblib", "load", ("canary",)),
    ("pandas", "read_pickle", ("canary",)),
    ("numpy", "load", ("canary",)),
    ("numpy", "fromfile", ("canary",)),
    ("numpy.core.multiarray", "fromfile", ("canary",)),
    ("numpy.testing._private.utils", "runstring", (CANARY, {})),
    ("torch", "load", ("canary",)),
    ("torch.serialization", "load", ("canary",)),
    ("torch.hub", "load", ("canary", "canary")),
    ("torch.jit", "load", ("canary",)),
    ("torch.jit._script", "unpickle_script_module", (b"",)),
    ("torch._utils", "_import_dotted_name", ("os.system",)),
    ("torch._utils", "_set_obj_state", (None, {})),
    ("torch._dynamo.guards", "GuardBuilder.get", ("x",)),
    ("torch.utils.data.datapipes.utils.decoder", "basichandlers", ("pickle", b"N.")),
    ("torch.utils._config_module", "ConfigModule.load_config", (b"N.",)),
    ("torch.utils.bottleneck.__main__", "run_cprofile", (CANARY, {})),
    ("copyreg", "__reduce_ex__", (None,)),
    ("copyreg", "__newobj__", (asm.name("subprocess", "Popen"),)),
    ("copyreg", "add_extension", ("os", "system", 1)),
    ("copy_reg", "__newobj_ex__", (asm.name("subprocess", "Popen"), (), {})),
    ("logging.config", "listen", ()),
    ("sys", "exit", ()),
    ("gc", "get_objects", ()),
    ("idlelib.pyshell", "ModifiedInterpreter.runcommand", (CANARY,)),
    ("omegaconf", "OmegaConf.register_new_resolver", ("canary",)),
    ("omegaconf.dictconfig", "DictConfig.get", ("canary",)),
    ("datetime", "datetime.now", ()),
    ("pathlib", "Path", ("canary",)),
    ("pathlib", "PosixPath.touch", ("canary",)),
    ("mypkg.models", "build_model", ()),
    ("__main__", "main", ()),
]


def refuse(folder: Path, raw: bytes, error: type[InvalidInput] = UnsafePickle) -> str:
    """The message of the refusal, both from a file and from bytes."""
    path = folder / "hostile"
    path.write_bytes(raw)
    with open(path, "rb") as file, nothing_runs(folder), pytest.raises(error) as first:
        read_pickle_file(file, size=len(raw), what="hostile.pth")
    with nothing_runs(folder), pytest.raises(error) as second:
        read_pickle_bytes(raw, what="hostile.pth")
    assert type(first.value) is type(second.value) is error
    assert str(first.value) == str(second.value)
    message = str(first.value)
    assert message.startswith("hostile.pth")
    assert "\n" not in message
    assert message.isprintable()
    return message


def accept(folder: Path, raw: bytes) -> PickleFile:
    with nothing_runs(folder):
        return read_pickle_bytes(raw, what="odd.pth")


FORMS = {
    "REDUCE": lambda module, attribute, arguments: asm.call(asm.name(module, attribute), *arguments),
    "STACK_GLOBAL": lambda module, attribute, arguments: asm.call(asm.stack_name(module, attribute), *arguments),
    "INST": lambda module, attribute, arguments: asm.inst(module, attribute, *arguments),
    "OBJ": lambda module, attribute, arguments: asm.obj(asm.name(module, attribute), *arguments),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("module", "attribute", "arguments"), CALLS, ids=[f"{call[0]}.{call[1]}" for call in CALLS])
def test_a_call_is_refused_by_its_name(
    tmp_path: Path, module: str, attribute: str, arguments: tuple[object, ...], form: str
) -> None:
    message = refuse(tmp_path, asm.pickle(FORMS[form](module, attribute, arguments)))
    if attribute != "_load_type":
        assert f"{module}.{attribute} " in message
    assert "nothing was run" in message
    assert "byte" in message
    assert "safetensors" in message


@pytest.mark.parametrize("make", [asm.new, asm.new_with_keywords], ids=["NEWOBJ", "NEWOBJ_EX"])
@pytest.mark.parametrize(
    ("module", "attribute"),
    sorted({call[:2] for call in CALLS if call[:2] != ("pathlib", "Path")}),
    ids=str,
)
def test_an_instance_of_a_function_or_of_a_class_that_does_things_is_refused(
    tmp_path: Path, module: str, attribute: str, make: object
) -> None:
    assert callable(make)
    message = refuse(tmp_path, asm.pickle(make(asm.name(module, attribute), CANARY)))
    assert f"{module}.{attribute} " in message


SYSTEM = asm.call(asm.name("os", "system"), CANARY)
ORDERED = asm.call(asm.name("collections", "OrderedDict"))
TENSOR = asm.tensor(asm.storage(), 0, (4,), (1,))

PLACES: dict[str, bytes] = {
    "bare": asm.pickle(SYSTEM),
    "protocol 0": b"cos\nsystem\n(S'touch canary'\ntR.",
    "protocol 4": b"\x80\x04\x95\x1d"
    + bytes(7)
    + b"\x8c\x02os\x94\x8c\x06system\x94\x93\x94\x8c\x06canary\x94\x85\x94R.",
    "in a list": asm.pickle([1, [2, SYSTEM]]),
    "as a value of a dict": asm.pickle({"a": SYSTEM}),
    "as a key of a dict": asm.pickle({SYSTEM: 1}),
    "in a tuple": asm.pickle((1, (SYSTEM,))),
    "in a set": b"\x80\x04\x8f(" + asm.value(SYSTEM) + b"\x90.",
    "popped at once": asm.pickle(asm.Code(asm.value(SYSTEM) + b"0N")),
    "behind a mark that is dropped": asm.pickle(asm.Code(b"(" + asm.value(SYSTEM) + b"1N")),
    "through the memo": asm.pickle(asm.Code(b"cos\nsystem\nq\x050" + b"h\x05" + asm.value((CANARY,)) + b"R")),
    "through dup": asm.pickle(asm.Code(b"cos\nsystem\n2" + asm.value((CANARY,)) + b"R0")),
    "in the state of an OrderedDict": asm.pickle(asm.build(ORDERED, {"_metadata": SYSTEM})),
    "in the state of unknown data": asm.pickle(asm.build(asm.new(asm.name("mypkg", "Model")), {"__dict__": SYSTEM})),
    "as an argument of unknown data": asm.pickle(asm.new(asm.name("mypkg", "Model"), SYSTEM)),
    "as a storage class": asm.torch_zip(asm.tensor(asm.storage(cls=SYSTEM), 0, (4,), (1,))),
    "as hooks": asm.torch_zip(asm.tensor(asm.storage(), 0, (4,), (1,), hooks=SYSTEM)),
    "as metadata of a tensor": asm.torch_zip(asm.tensor(asm.storage(), 0, (4,), (1,), metadata=SYSTEM)),
    "as a shape": asm.torch_zip(asm.tensor(asm.storage(), 0, SYSTEM, (1,))),
    "as the key of a storage": asm.torch_zip(asm.persistent(("storage", asm.name("torch", "FloatStorage"), SYSTEM))),
    "as the function of a tensor of a type": asm.torch_zip(
        asm.call(
            asm.name("torch._tensor", "_rebuild_from_type_v2"),
            asm.name("os", "system"),
            asm.name("torch", "Tensor"),
            (CANARY,),
            {},
        )
    ),
    "as the base of a reconstructed class": asm.pickle(
        asm.call(asm.name("copyreg", "_reconstructor"), asm.name("mypkg", "Model"), asm.name("os", "system"), None)
    ),
    "as a reconstructed class": asm.pickle(
        asm.call(asm.name("copy_reg", "_reconstructor"), asm.name("os", "system"), asm.name("builtins", "object"), None)
    ),
    "in a zip of torch": asm.torch_zip({"state_dict": TENSOR, "x": SYSTEM}),
    "in a legacy file": asm.legacy({"state_dict": asm.old_storage(), "x": SYSTEM}),
    "in a legacy file's version": asm.pickle(asm.MAGIC) + asm.pickle(SYSTEM),
    "in a legacy file's system": asm.legacy({}, system=SYSTEM),
    "in a legacy file's keys": asm.legacy({}, keys=[SYSTEM]),
    "in a tar's storages": asm.torch_tar(storages=asm.pickle(SYSTEM), tensors=asm.pickle(0), pickle=asm.pickle(1)),
    "in a tar's tensors": asm.torch_tar(
        storages=asm.pickle(0) + asm.pickle([]), tensors=asm.pickle(SYSTEM), pickle=asm.pickle(1)
    ),
    "in a tar's pickle": asm.torch_tar(
        storages=asm.pickle(0) + asm.pickle([]), tensors=asm.pickle(0), pickle=asm.pickle(SYSTEM)
    ),
    "in a tar's system": asm.torch_tar(sys_info=asm.pickle(SYSTEM), storages=b"", tensors=b"", pickle=b""),
    "in a storage's bytes": asm.pickle(
        asm.call(asm.name("torch.storage", "_load_from_bytes"), asm.legacy({"x": SYSTEM}))
    ),
    "in a zip in a storage's bytes": asm.pickle(
        asm.call(asm.name("torch.storage", "_load_from_bytes"), asm.torch_zip({"x": SYSTEM}))
    ),
    "in a storage's bytes in a storage's bytes": asm.pickle(
        asm.call(
            asm.name("torch.storage", "_load_from_bytes"),
            asm.pickle(asm.call(asm.name("torch.storage", "_load_from_bytes"), asm.pickle(SYSTEM))),
        )
    ),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_call_is_refused_wherever_it_stands(tmp_path: Path, place: str) -> None:
    assert "os.system" in refuse(tmp_path, PLACES[place])


def test_dill_bytes_in_a_file_are_only_bytes_until_they_are_read_under_the_same_rules(tmp_path: Path) -> None:
    file = accept(tmp_path, asm.torch_zip({"pickles": {"epoch": asm.pickle(3), "cfg": asm.pickle(SYSTEM)}}))
    assert isinstance(file.tree, dict)
    inner = file.tree["pickles"]
    assert read_pickle_bytes(inner["epoch"], what="epoch", budget=file.budget).tree == 3
    with nothing_runs(tmp_path), pytest.raises(UnsafePickle, match=r"cfg: the pickle calls os\.system at byte"):
        read_pickle_bytes(inner["cfg"], what="cfg", budget=file.budget)


NAMES: dict[str, tuple[str, str]] = {
    "a line break in the module": ("os\nsystem", "path"),
    "a line break in the name": ("os", "path\nsystem"),
    "a look-alike of another alphabet": ("\u043es", "system"),
    "a full-width name": ("builtins", "\uff53et"),
    "an empty name": ("os", ""),
    "an empty module": ("", "system"),
    "a dot too many": ("os.", "system"),
    "a space": ("os ", "system"),
    "a call in the name": ("os", "system('canary')"),
    "a NUL": ("builtins", "set\0"),
    "a lambda": ("mypkg", "<lambda>"),
    "an escape of the terminal": ("\x1b[31mos", "system"),
}


@pytest.mark.parametrize("trick", NAMES)
def test_a_name_that_is_no_plain_identifier_is_refused_even_as_a_value(tmp_path: Path, trick: str) -> None:
    message = refuse(tmp_path, asm.pickle([asm.stack_name(*NAMES[trick])]))
    assert message.isascii()


OTHERS: dict[str, bytes] = {
    "extension 1": b"\x80\x02\x82\x01.",
    "extension 2": b"\x80\x02\x83\x01\x00.",
    "extension 4": b"\x80\x02\x84\x01\x00\x00\x00.",
    "a call of a text": asm.pickle(asm.call(asm.Code(asm.value("os.system")), CANARY)),
    "a call of a dict": asm.pickle(asm.call(asm.Code(b"}"), CANARY)),
    "a call of an instance": asm.pickle(asm.call(asm.new(asm.name("mypkg", "Callback")), CANARY)),
    "a call of a dtype": asm.torch_zip(asm.call(asm.name("torch", "float32"), CANARY)),
    "a call of what only names a type": asm.pickle(asm.call(asm.name("typing", "Any"), CANARY)),
    "an instance of a text": asm.pickle(asm.new(asm.Code(asm.value("os.system")))),
    "an instance of an instance": asm.pickle(asm.new(asm.new(asm.name("mypkg", "Model")))),
    "an instance of a function that is known": asm.pickle(asm.new(asm.name("_codecs", "encode"), "a", "latin1")),
    "a rot13 codec": asm.pickle(asm.call(asm.name("_codecs", "encode"), "a", "rot13")),
    "a reconstructed int": asm.pickle(
        asm.call(
            asm.name("copyreg", "_reconstructor"), asm.name("subprocess", "Popen"), asm.name("builtins", "object"), None
        )
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_is_no_function_of_the_short_list_is_never_called(tmp_path: Path, case: str) -> None:
    refuse(tmp_path, OTHERS[case])


STATES: dict[str, bytes] = {
    "of a dict": asm.pickle(asm.build(asm.Code(b"}"), {"__class__": "os"})),
    "of a list": asm.pickle(asm.build(asm.Code(b"]"), {"a": 1})),
    "of a text": asm.pickle(asm.build(asm.Code(asm.value("a")), {"a": 1})),
    "of a global": asm.pickle(asm.build(asm.name("os", "path"), {"join": 1})),
    "of a known class": asm.pickle(asm.build(asm.name("collections", "OrderedDict"), {"update": 1})),
    "of an OrderedDict, in slots": asm.pickle(asm.build(ORDERED, (None, {"a": 1}))),
    "of an OrderedDict, twice": asm.pickle(asm.build(asm.build(ORDERED, {}), {})),
    "of a tensor": asm.torch_zip(asm.build(TENSOR, {"requires_grad": True})),
    "of a number": asm.pickle(asm.build(asm.Code(b"K\x01"), {"a": 1})),
}


@pytest.mark.parametrize("case", STATES)
def test_a_state_goes_only_to_what_takes_one(tmp_path: Path, case: str) -> None:
    refuse(tmp_path, STATES[case], InvalidInput)


def test_dunder_names_in_the_state_of_unknown_data_are_only_data(tmp_path: Path) -> None:
    state = {"__class__": asm.name("os", "system"), "__reduce__": "x", "__setstate__": asm.name("builtins", "exec")}
    file = accept(tmp_path, asm.pickle(asm.build(asm.new(asm.name("mypkg", "Model")), state)))
    assert file.opaque == ("builtins.exec", "mypkg.Model", "os.system")


PERSISTENT: dict[str, tuple[bytes, type[InvalidInput]]] = {
    "in a bare pickle": (asm.pickle(asm.storage()), InvalidInput),
    "a text, protocol 0": (b"Pcanary\n.", InvalidInput),
    "no storage": (asm.torch_zip(asm.persistent(("module", asm.name("os", "system"), "a", "b"))), InvalidInput),
    "a global": (asm.torch_zip(asm.persistent(asm.name("os", "system"))), InvalidInput),
    "a class that is no storage": (asm.torch_zip(asm.storage(cls=asm.name("os", "system"))), UnsafePickle),
    "a storage of another module": (asm.torch_zip(asm.storage(cls=asm.name("evil", "FloatStorage"))), UnsafePickle),
    "in a legacy file": (asm.legacy(asm.persistent(("module", "os", "a", "b"))), InvalidInput),
}


@pytest.mark.parametrize("case", PERSISTENT)
def test_a_persistent_id_names_a_storage_or_nothing(tmp_path: Path, case: str) -> None:
    raw, error = PERSISTENT[case]
    refuse(tmp_path, raw, error)


def test_the_observer_would_have_seen_it(tmp_path: Path) -> None:
    with pytest.raises(AssertionError), nothing_runs(tmp_path):
        subprocess.run(["true"], check=True)
    with pytest.raises(AssertionError), nothing_runs(tmp_path):
        (tmp_path / "canary").touch()
    with pytest.raises(AssertionError), nothing_runs(tmp_path):
        os.system("true")
    with pytest.raises(AssertionError), nothing_runs(tmp_path):
        eval("1")
