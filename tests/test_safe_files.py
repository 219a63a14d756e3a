"""Tests of tensors."""

import io
import os
import pickle
import resource
import signal
import struct
import subprocess
import sys
import warnings
import zipfile
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from common import safe_files
from common.console import InputError
from tests.shared import REPO, SHARED, Evil, same_tensors

LOADERS = {
    "pth": safe_files.load_tensors,
    "npz": safe_files.load_arrays,
    "safetensors": safe_files.load_safetensors,
}


@contextmanager
def modest(seconds=20, megabytes=200):
    """Fail if the block takes longer, or the process grows by more (Linux counts in KiB)."""

    def stop(*_):
        raise AssertionError(f"not done after {seconds} s")

    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < megabytes * 1000


def refused_file(path, *words):
    """The loader for this kind of file refuses it in one short line that names it."""
    with modest(), pytest.raises(InputError) as error:
        LOADERS[path.suffix[1:]](path)
    text = str(error.value)
    assert path.name in text and text.isprintable() and len(text) < 600, text
    for word in words:
        assert word in text


def weights():
    generator = torch.Generator().manual_seed(0)
    return {f"layer.{i}": torch.randn(3, 50, generator=generator) for i in range(4)}


def torch_file(path, pickled, data=(), compression=zipfile.ZIP_STORED):
    """A torch file written by hand: its pickle and the bytes of its storages."""
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", compression) as archive:
        warnings.simplefilter("ignore")  # about names that occur twice
        for name, content in [("data.pkl", pickled), ("byteorder", b"little"), ("version", b"3\n"), *data]:
            archive.writestr(f"w/{name}", content)


# ---------------------------------------------------------------- every kind of file


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("what", ["absent", "pipe", "folder", "device", "socket", "link to a pipe", "loop"])
def test_only_regular_files_are_read(tmp_path, kind, what):
    path = tmp_path / f"w.{kind}"
    if what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    elif what == "device":
        path.symlink_to("/dev/zero")
    elif what == "socket":
        import socket

        os.chdir(tmp_path)  # the name of a socket is at most 107 bytes long
        socket.socket(socket.AF_UNIX).bind(path.name)
        os.chdir(REPO)
    elif what == "link to a pipe":
        os.mkfifo(tmp_path / "pipe")
        path.symlink_to(tmp_path / "pipe")
    elif what == "loop":
        path.symlink_to(path)
    refused_file(path)


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("content", [b"", b"\0" * 5000, b"<html>404</html>", b"PK\3\4", b"\x80\x02}q\0."])
def test_other_content(tmp_path, kind, content):
    path = tmp_path / f"w.{kind}"
    path.write_bytes(content)
    refused_file(path)


def test_names_that_no_file_can_have():
    for load in LOADERS.values():
        for name in ("a\0b", "a" * 5000):
            with pytest.raises(InputError):
                load(name)


def test_links_to_files_are_followed(tmp_path):
    torch.save(weights(), tmp_path / "w.pth")
    (tmp_path / "link.pth").symlink_to(tmp_path / "w.pth")
    assert same_tensors(safe_files.load_tensors(tmp_path / "link.pth"), weights())


@pytest.mark.parametrize("kind", ["pth", "old pth", "npz", "safetensors"])
def test_cut_anywhere(tmp_path, kind):
    """Whatever a full disk or a broken copy leaves is refused."""
    path = tmp_path / f"w.{kind.split()[-1]}"
    if kind.endswith("pth"):
        torch.save(weights(), path, _use_new_zipfile_serialization=kind == "pth")
    elif kind == "npz":
        np.savez(path, **{n: v.numpy() for n, v in weights().items()})
    else:
        pytest.importorskip("safetensors.torch").save_file(weights(), path)
    raw = path.read_bytes()
    for size in [*range(0, len(raw), max(1, len(raw) // 60)), len(raw) - 1]:
        path.write_bytes(raw[:size])
        refused_file(path)


def test_arrays_are_read_without_torch():
    code = "import sys, common.safe_files; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO).returncode == 0


def test_real_files():
    folder = SHARED / "weights"
    if not folder.exists():
        pytest.skip("no real weights here")
    arrays = safe_files.load_arrays(folder / "ViT-Ti_16-224.npz")
    with np.load(folder / "ViT-Ti_16-224.npz") as file:
        assert sorted(arrays) == sorted(file.files)
        assert all(np.array_equal(arrays[n], file[n]) for n in arrays)
    for name, number in (("dinov2_vits14", 174), ("tf_efficientnet_lite0", 296)):
        path = folder / f"{name}.safetensors"
        state = safe_files.load_safetensors(path)
        assert len(state) == number
        safe_files.check_state_dict(state, path)


# ---------------------------------------------------------------- torch.save


@pytest.mark.parametrize("old", [False, True])
def test_training_state_comes_back(tmp_path, old):
    """Nested dicts, lists, tuples and plain values, as in last.pth; the tensors do not depend on the file."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(5, 4)).square().sum().backward()
    optimizer.step()
    big = torch.arange(1000.0)
    value = {
        "format": 1,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": [(torch.get_rng_state(), None), (torch.get_rng_state(), None)],
        "state": {
            "step": 7,
            "best": 0.25,
            "note": "é",
            "history": [{"loss": 1e300, "ok": True}],
            3: -(2**70),
        },
        "parts": [big[10:20], big.view(10, 100).T, torch.tensor(3), torch.ones(0, 2)],
        "half": torch.ones(3, dtype=torch.bfloat16),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "shape": torch.Size([1, 2]),
    }
    path = tmp_path / "last.pth"
    torch.save(value, path, _use_new_zipfile_serialization=not old)
    loaded = safe_files.load_tensors(path)
    path.write_bytes(b"gone")
    assert list(loaded) == list(value)
    assert loaded["state"] == value["state"] and loaded["format"] == 1 and loaded["shape"] == (1, 2)
    assert same_tensors(loaded["model"], value["model"])
    for a, b in zip(loaded["parts"], value["parts"]):
        assert torch.equal(a, b) and a.dtype == b.dtype
    assert isinstance(loaded["rng"][1], tuple) and torch.equal(loaded["rng"][1][0], value["rng"][1][0])
    assert loaded["half"].dtype == torch.bfloat16 and loaded["half"].sum() == 3
    assert type(loaded["parameter"]) is torch.Tensor and type(loaded["model"]) is dict
    model.load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])
    for a, b in zip(optimizer.state.values(), value["optimizer"]["state"].values()):
        assert same_tensors(a, b)


def _csr(index):
    values = torch.ones(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.sparse_csr_tensor(index, torch.tensor([0]), values, (1, 1), check_invariants=False)


def _levels(number):
    value = []
    for _ in range(number):
        value = [value]
    return value


def _doubled(number):
    """Lists of twice the same list: 2 ** number leaves for whoever walks them all."""
    value = [torch.ones(1)]
    for _ in range(number):
        value = [value, value]
    return value


def _quantised():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated
        return torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)


HOSTILE = {
    "meta": lambda: {"a": torch.empty(10**12, 10**4, device="meta")},
    "sparse": lambda: {"a": torch.eye(3).to_sparse()},
    "sparse 10^9 x 10^9": lambda: {
        "a": torch.sparse_coo_tensor(torch.tensor([[0], [1]]), torch.ones(1), (10**9, 10**9))
    },
    "sparse rows": lambda: {"a": _csr(torch.tensor([0, 1]))},
    "quantised": lambda: {"a": _quantised()},
    "expanded": lambda: {"a": torch.ones(1).expand(10**9)},
    "expanded, deep inside": lambda: {"a": {"b": [({"c": torch.ones(1).expand(10**4, 10**5)},)]}},
    "expanded, overlapping windows": lambda: {"a": torch.ones(1000).as_strided((900, 90), (1, 1))},
    "same memory 1000 times": lambda: {"a": list(torch.ones(1).repeat(99999).unfold(0, 9000, 90))},
    "integer keys": lambda: {0: torch.ones(3)},
    "one integer key": lambda: {"a": torch.ones(3), 1: torch.ones(3)},
    "tuple for a key": lambda: {"a": {(1, 2): torch.ones(3)}},
    "tensor for a key": lambda: {"a": {torch.ones(3): 1}},
    "list": lambda: [torch.ones(3)],
    "tensor": lambda: torch.ones(3),
    "number": lambda: 3,
    "NumPy array": lambda: {"a": np.ones(3)},
    "set": lambda: {"a": {1, 2}},
    "function": lambda: {"a": torch.nn.functional.gelu},
    "module": lambda: {"a": torch.nn.Linear(2, 2)},
    "110 levels": lambda: {"a": _levels(110)},
}


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_torch_file(tmp_path, what, old):
    path = tmp_path / "w.pth"
    torch.save(HOSTILE[what](), path, _use_new_zipfile_serialization=not old)
    refused_file(path)


def test_unusual_but_harmless_torch_files(tmp_path):
    path = tmp_path / "w.pth"
    torch.save({"a": _doubled(60)}, path)
    with modest():
        loaded = safe_files.load_tensors(path)
    while len(loaded) == 2 or "a" in loaded:
        loaded = loaded["a"] if isinstance(loaded, dict) else loaded[0]
    assert torch.equal(loaded[0], torch.ones(1))
    # An OrderedDict {"a": 7} with attributes that hide two of its methods.
    hidden = b"}U\x05itemsK\x01sU\x04keysK\x01sb"
    torch_file(path, b"\x80\x02ccollections\nOrderedDict\n)R" + hidden + b"U\x01aK\x07s.")
    assert safe_files.load_tensors(path) == {"a": 7}


@pytest.mark.parametrize("form", ["torch.save", "old torch.save", "pickle"])
def test_code_is_never_run(tmp_path, form):
    path, mark = tmp_path / "w.pth", tmp_path / "executed"
    value = {"a": Evil(mark)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(value, protocol=2))
    else:
        torch.save(value, path, _use_new_zipfile_serialization=form == "torch.save")
    refused_file(path, "refused", "open")
    assert not mark.exists()


def pickled_tensor(numel, shape, stride=(1,)):
    """The pickle of {"a": float32 tensor} whose storage, number 0, claims `numel` elements."""
    torch.save({"a": torch.full((77,), 1.0)}, buffer := io.BytesIO())
    with zipfile.ZipFile(buffer) as archive:
        raw = archive.read(next(n for n in archive.namelist() if n.endswith("data.pkl")))

    def number(n):
        return b"\x8a\x08" + struct.pack("<q", n)  # LONG1 of 8 bytes

    head, tail = raw.split(b"K\x4d", 1)  # 77 stands there twice: elements of the storage, and the shape
    between, tail = tail.split(b"K\x4d\x85", 1)
    end = {1: b"\x85", 2: b"\x86"}[len(shape)]
    tail = tail[tail.index(b"K\x01\x85") + 3 :]  # the stride
    memo = b"q\x63"
    shape, stride = (b"".join(map(number, x)) + end for x in (shape, stride))
    return head + number(numel) + between + shape + memo + stride + tail


def test_pickled_tensor_is_what_torch_reads(tmp_path):
    """The forger of the next tests: with honest numbers the file is accepted."""
    torch_file(tmp_path / "w.pth", pickled_tensor(4, (4,)), [("data/0", np.arange(4, dtype="<f4").tobytes())])
    assert safe_files.load_tensors(tmp_path / "w.pth")["a"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "numel, shape, stride",
    [
        (10**12, (10**12,), (1,)),
        (10**6, (10**6,), (1,)),
        (4, (10**12,), (1,)),
        (4, (10**12,), (0,)),
        (4, (10**6, 10**6), (0, 0)),
        (4, (2**62, 4), (0, 0)),
        (4, (-4,), (1,)),
        (4, (4,), (-1,)),
        (-4, (4,), (1,)),
        (2**62, (2**62,), (1,)),
    ],
)
def test_forged_sizes(tmp_path, numel, shape, stride):
    torch_file(tmp_path / "w.pth", pickled_tensor(numel, shape, stride), [("data/0", bytes(16))])
    refused_file(tmp_path / "w.pth")


def test_forged_archives(tmp_path):
    path, four = tmp_path / "w.pth", ("data/0", bytes(16))
    torch_file(path, pickled_tensor(4, (4,)), [four], zipfile.ZIP_DEFLATED)
    refused_file(path, "compressed")
    torch_file(path, pickled_tensor(4, (4,)), [four, four])
    refused_file(path)
    torch_file(path, pickled_tensor(4, (4,)))  # no storage
    refused_file(path)
    torch_file(path, b"\x80\x02}U\x01a" + b"]" * 10**5 + b"a" * (10**5 - 1) + b"s.")  # lists in lists
    refused_file(path, "levels")
    torch_file(path, b"\x80\x02}U\x01a]q\x00h\x00as.")  # a list that holds itself
    refused_file(path, "levels")
    for name in (b"ctorch\nTensor\n", b"c__builtin__\nbytearray\n"):  # name(10**12)
        torch_file(path, b"\x80\x02}U\x01a" + name + b"\x8a\x08" + struct.pack("<q", 10**12) + b"\x85Rs.")
        refused_file(path, name.split()[1].decode())


def test_changed_bytes(tmp_path):
    """A changed byte in the tensors of a file is noticed."""
    path = tmp_path / "w.pth"
    torch.save(weights(), path)
    raw = bytearray(path.read_bytes())
    at = raw.index(weights()["layer.2"].numpy().tobytes())
    raw[at + 5] ^= 1
    path.write_bytes(raw)
    refused_file(path, "check sum")


# ---------------------------------------------------------------- safetensors


def test_safetensors_round_trip(tmp_path):
    state = {**weights(), "half": torch.ones(2, dtype=torch.bfloat16), "count": torch.tensor(3)}
    path = tmp_path / "w.safetensors"
    pytest.importorskip("safetensors.torch").save_file(state, path)
    loaded = safe_files.load_safetensors(path)
    assert same_tensors(loaded, state)
    path.write_bytes(b"gone")
    assert same_tensors(loaded, state)


@pytest.mark.parametrize(
    "header, length",
    [
        (b"{}", 2**63),
        (b"{}", 10**10),
        (b'{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,16]}}', None),
        (b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,4000000000000]}}', None),
        (b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,16]}}', None),
        (b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[16,0]}}', None),
        (b'{"a":{"dtype":"F32","shape":[-4],"data_offsets":[0,16]}}', None),
        (b'{"a":{"dtype":"X9","shape":[4],"data_offsets":[0,16]}}', None),
        (b"[" * 50_000, None),
        (b"\xff\xfe{}", None),
    ],
)
def test_hostile_safetensors(tmp_path, header, length):
    pytest.importorskip("safetensors")
    path = tmp_path / "w.safetensors"
    path.write_bytes(struct.pack("<Q", length or len(header)) + header + bytes(16))
    refused_file(path)


# ---------------------------------------------------------------- state dicts


@pytest.mark.parametrize(
    "state",
    [
        {},
        [torch.ones(3)],
        None,
        {1: torch.ones(3)},
        {"a": 3},
        {"a": {"b": torch.ones(3)}},
        {"a": torch.tensor(3.0)},
        {"a": torch.ones(3, 0)},
        {"a": torch.ones(3, dtype=torch.int64)},
        {"a": torch.ones(3, dtype=torch.complex64)},
        {"a": torch.ones(3, dtype=torch.bool)},
        {"a": torch.ones(3).to(torch.float8_e4m3fn)},
        {"num_batches_tracked": torch.ones(3, dtype=torch.int64)},
    ],
)
def test_what_is_no_state_dict(state):
    good = {"w": torch.ones(2)} if isinstance(state, dict) and state else {}
    with pytest.raises(InputError, match="w.pth"):
        safe_files.check_state_dict({**good, **state} if good else state, "w.pth")


def test_batch_norm_counts_are_part_of_a_state_dict():
    safe_files.check_state_dict(torch.nn.BatchNorm2d(3).state_dict(), "w.pth")


# ---------------------------------------------------------------- .npz


def npy_bytes(shape, descr="<f4", data=b"", version=1):
    """An .npy written by hand, whatever its header claims."""
    header = repr({"descr": descr, "fortran_order": False, "shape": shape}).encode() + b"\n"
    length = struct.pack("<H" if version == 1 else "<I", len(header))
    return b"\x93NUMPY" + bytes([version, 0]) + length + header + data


def npz_file(path, *members, compression=zipfile.ZIP_DEFLATED):
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", compression) as archive:
        warnings.simplefilter("ignore")  # about names that occur twice
        for name, content in members:
            archive.writestr(name, content)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_come_back(tmp_path, save):
    arrays = {
        "scalar": np.array(3),
        "empty": np.ones((0, 5)),
        "text": np.array(["a", "é", "longer"]),
        "columns first": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "big-endian": np.arange(4, dtype=">f8"),
        "a/b": np.zeros((300, 300), np.uint8),
    }
    save(tmp_path / "w.npz", **arrays)
    loaded = safe_files.load_arrays(tmp_path / "w.npz")
    assert list(loaded) == list(arrays)
    for name, array in arrays.items():
        assert loaded[name].dtype == array.dtype and np.array_equal(loaded[name], array)


GOOD = npy_bytes((4,), data=bytes(16))
BAD_ARRAYS = {
    "10^12 elements": npy_bytes((10**12,), data=bytes(16)),
    "10^6 x 10^6": npy_bytes((10**6, 10**6), data=bytes(16)),
    "product beyond 64 bits": npy_bytes((2**32, 2**32), data=b""),
    "two negative axes": npy_bytes((-2, -2), data=bytes(16)),
    "one element too many": npy_bytes((5,), data=bytes(16)),
    "one element too few": npy_bytes((3,), data=bytes(16)),
    "elements of no bytes": npy_bytes((10**12,), "|S0"),
    "records of no bytes": npy_bytes((10**12,), "|V0"),
    "Python objects": npy_bytes((1,), "|O", pickle.dumps([1])),
    "records with Python objects": npy_bytes((1,), [("a", "|O")], pickle.dumps([1])),
    "unknown type": npy_bytes((4,), "<q7", bytes(16)),
    "version 9": npy_bytes((4,), data=bytes(16), version=9),
    "header of 100,000 brackets": b"\x93NUMPY\1\0" + struct.pack("<H", 60000) + b"(" * 60000,
    "header longer than the file": b"\x93NUMPY\2\0" + struct.pack("<I", 2**32 - 1) + b"{",
    "no array": b"hello",
    "nothing": b"",
}


@pytest.mark.parametrize("what", BAD_ARRAYS)
def test_hostile_array(tmp_path, what):
    npz_file(tmp_path / "w.npz", ("good.npy", GOOD), ("bad.npy", BAD_ARRAYS[what]))
    refused_file(tmp_path / "w.npz")


def test_hostile_archives(tmp_path, monkeypatch):
    path = tmp_path / "w.npz"
    np.save(tmp_path / "bare.npy", np.ones(3))
    (tmp_path / "bare.npy").rename(path)
    refused_file(path)
    for names in (("a.npy", "a.npy"), ("a", "a.npy")):
        npz_file(path, *[(n, GOOD) for n in names])
        refused_file(path, "same name")
    for compression in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        npz_file(path, ("a.npy", GOOD), compression=compression)
        refused_file(path, "compressed")
    npz_file(path, ("\x1b[2J\n" * 50 + ".npy", b"no array"))
    refused_file(path)
    np.savez(path, a=np.array([Evil(tmp_path / "executed")], dtype=object))
    refused_file(path, "pickled")
    assert not (tmp_path / "executed").exists()
    monkeypatch.setattr(safe_files, "ROOM", 1 << 20)
    np.savez_compressed(path, a=np.zeros(3 << 20, np.uint8))
    refused_file(path, "unpack to 3 MiB, over 1 MiB")
    np.savez_compressed(path, a=np.zeros(1 << 19, np.uint8))
    assert safe_files.load_arrays(path)["a"].size == 1 << 19


def test_archive_that_lies_about_its_size(tmp_path):
    """The table of contents claims 10 GiB for 144 bytes: refused before anything is unpacked."""
    path = tmp_path / "w.npz"
    npz_file(path, ("a.npy", GOOD), compression=zipfile.ZIP_STORED)
    raw = path.read_bytes()
    at = raw.index(b"PK\1\2") + 24  # the uncompressed size there
    path.write_bytes(raw[:at] + struct.pack("<I", 0xFFFFFFF0) + raw[at + 4 :])
    refused_file(path, "unpack")
