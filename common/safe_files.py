"""Tensors and arrays from files are data: read without running code, checked before memory is spent on them.

load_tensors      .pth, .pt, .bin (torch.save)  -> dict, nested as it was saved
load_safetensors  .safetensors                  -> {name: tensor}
load_arrays       .npz                          -> {name: array}
check_state_dict  refuses what cannot be the weights of a model

A file can claim far more than it holds: an expanded tensor needs 4 bytes on disk for any number of elements,
and a zip archive of zeros shrinks a thousandfold. So what a file claims is first compared with its size.
Whatever is wrong with a file is an InputError of one line. PyTorch is imported only where it is needed:
reading an .npz does without it.
"""

import contextlib
import math
import os
import pickletools
import re
import warnings
import zipfile

from numpy.lib import format as npy

from common.console import InputError
from common.files import check_regular

ROOM = 256 << 20  # bytes; any .npz may unpack to this much
GROWTH = 20  # a larger .npz may unpack to this many times its size (trained weights: 1 to 3 times)
DEPTH = 100  # levels of dicts and lists in a torch file; a training state has 5

# The classes and functions a torch file may name: those that make dense tensors and plain Python values.
_PLAIN = re.compile(
    r"torch\._utils _rebuild_(tensor(_v[23])?|parameter)|torch\.nn\.parameter Parameter"
    r"|torch(\.storage)? \w+Storage|torch ((b?float|u?int|complex)\d\w*|bool|Size)|collections OrderedDict"
)
_VALUES = (str, int, float, bool, type(None))


class Refused(InputError):
    """A torch file names `name`, which may be code. `first`: the first thing in its pickle, "dict" or a
    class, which is what the file holds."""

    def __init__(self, text, name, first):
        super().__init__(text)
        self.name, self.first = name, first


def listed(names, limit=6):
    """Names from a file for a message: the first `limit`, control characters escaped, long ones cut."""
    names = list(names)
    more = [f"and {len(names) - limit} more"] if len(names) > limit else []
    return ", ".join([_cut(repr(str(name))[1:-1]) for name in names[:limit]] + more)


def _cut(text, limit=160):
    return text if len(text) <= limit else text[:limit] + "..."


def _reason(error):
    """The first line of an exception's text, control characters escaped and cut."""
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    return _cut(repr(lines[0])[1:-1])


def _file_size(path):
    """Size in bytes of a regular file, symbolic links followed. InputError if absent or anything else.

    A named pipe in the place of a file would make its reader wait for ever.
    """
    try:
        check_regular(path)
        return os.path.getsize(path)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be read ({_reason(error)})") from None


# ---------------------------------------------------------------- torch.save


def load_tensors(path, copy=True):
    """A file of torch.save -> dict with text for its top-level keys; the tensors are dense and on the CPU.

    Without `copy` they may be views of the file: half the memory for who only reads them once. Dicts, lists
    and tuples may be nested. An OrderedDict becomes a dict, a Parameter a tensor.
    InputError if the file is absent, damaged, or holds anything but dense tensors and plain Python values
    (code in a pickle is not run), or if its tensors together claim more bytes than the file has.
    """
    size = _file_size(path)
    import torch

    try:
        zipped = _check_torch_file(path, size)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # mmap: storages become views of the file, so that a false length cannot reach beyond it.
            value = torch.load(os.fspath(path), map_location="cpu", weights_only=True, mmap=zipped)
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in dict.keys(value)):
            raise InputError(f"{path} is not a state dict: it does not hold a dict with text for keys")
        return _Copier(path, size, copy)(value)
    except InputError:
        raise
    except Exception as error:  # damage shows as almost any exception
        raise InputError(
            f"{path} cannot be loaded: it is damaged or was not written by torch.save ({_reason(error)}); "
            "copy it again from where it came"
        ) from None


def _check_torch_file(path, size):
    """Check what the file's pickles name. True if it is a zip archive, as torch.save writes since 1.6."""
    with open(path, "rb") as file:
        zipped = file.read(4) == b"PK\3\4"
        file.seek(0)
        if not zipped:
            for _ in range(5):  # magic number, version, system, the object, names of its storages
                _check_pickle(file, path)
            return False
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            if any(m.compress_type != zipfile.ZIP_STORED for m in members):
                raise InputError(f"{path} is a compressed archive, which torch.save never writes")
            if sum(m.file_size for m in members) > size or len(set(archive.namelist())) < len(members):
                raise InputError(f"{path} is damaged: its parts overlap")
            if wrong := archive.testzip():  # torch.load does not compare check sums
                raise InputError(f"{path} is damaged: the check sum of {listed([wrong])} is wrong")
            for member in members:
                if member.filename.lower().endswith(".pkl"):
                    with archive.open(member) as pickled:
                        _check_pickle(pickled, path)
    return True


def _check_pickle(file, path):
    """Read one pickle without running it; InputError if it names what `_PLAIN` does not."""
    first = None
    for opcode, value, _ in pickletools.genops(file):
        if opcode.name in ("EMPTY_DICT", "GLOBAL") and first is None:
            first = value or "dict"
        if opcode.name in ("GLOBAL", "INST", "STACK_GLOBAL") and not _PLAIN.fullmatch(str(value)):
            name = str(value).replace(" ", ".")
            raise Refused(
                f"{path} was refused: it names {listed([name])}, perhaps code; only dense tensors and plain "
                "Python values are read",
                name,
                first,
            )


class _Copier:
    """Copies what was loaded into plain dicts, lists and tensors; counts the bytes that the tensors claim.
    Without `copy` the tensors are checked and handed on."""

    def __init__(self, path, size, copy=True):
        self.path, self.left, self.copies, self.copy = path, size, {}, copy

    def __call__(self, value, depth=0):
        if type(value) in _VALUES:
            return value
        if id(value) not in self.copies:  # a shared value is copied once
            if depth > DEPTH:
                raise InputError(f"{self.path} is nested more than {DEPTH} levels deep")
            self.copies[id(value)] = self._copy(value, depth + 1)
        return self.copies[id(value)]

    def _copy(self, value, depth):
        import torch

        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if isinstance(value, dict):  # dict.items: an attribute from the file could hide the method
            return {self._key(k): self(v, depth) for k, v in dict.items(value)}
        if isinstance(value, (list, tuple)):
            kind = list if isinstance(value, list) else tuple
            return kind(self(v, depth) for v in value)
        if isinstance(value, torch.dtype):
            return value
        raise InputError(f"{self.path} holds a {type(value).__name__}, neither a tensor nor a plain value")

    def _key(self, key):
        if type(key) not in _VALUES:
            raise InputError(f"{self.path} has a {type(key).__name__} for a key: it must be text or a number")
        return key

    def _tensor(self, value):
        import torch

        dense = value.layout == torch.strided and value.device.type == "cpu"
        if not dense or value.is_quantized or value.is_nested:
            raise InputError(f"{self.path} holds a tensor that is not dense")
        claimed, held = value.numel() * value.element_size(), value.untyped_storage().nbytes()
        if claimed > held:
            raise InputError(
                f"{self.path} holds an expanded tensor, {held} bytes for the shape {tuple(value.shape)}: "
                "save it with .contiguous()"
            )
        self.left -= claimed
        if self.left < 0:
            raise InputError(
                f"{self.path}: its tensors claim more bytes than the file has; if they share memory, "
                "save each with .clone()"
            )
        value = value.detach()
        return value.clone() if self.copy else value


# ---------------------------------------------------------------- safetensors


def load_safetensors(path, copy=True):
    """A .safetensors file -> {name: tensor}, on the CPU; without `copy` they may be views of the file.

    InputError if the file is absent or damaged, or the package safetensors is not installed.
    """
    size = _file_size(path)
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise InputError(f"{path} needs the package safetensors: pip install safetensors") from None
    try:
        return _Copier(path, size, copy)(load_file(os.fspath(path)))
    except InputError:
        raise
    except Exception as error:  # damage shows as almost any exception
        raise InputError(
            f"{path} cannot be loaded: it is damaged or not a safetensors file ({_reason(error)}); "
            "copy it again from where it came"
        ) from None


# ---------------------------------------------------------------- weights


def check_state_dict(state, path):
    """InputError unless `state` is {text: tensor}, as the weights of a model are. `path` is for the message.

    Each tensor has at least one axis, no axis of length 0, and floating-point values of 16, 32 or 64 bits.
    The one exception is the scalar num_batches_tracked of BatchNorm, an int64.
    """
    import torch

    if not isinstance(state, dict) or not state:
        raise InputError(f"{path} is not a state dict: it holds no named tensors")
    if any(not isinstance(name, str) for name in state):
        raise InputError(f"{path} is not a state dict: not all of its keys are text")
    if wrong := [name for name, value in state.items() if not isinstance(value, torch.Tensor)]:
        raise InputError(f"{path} is not a state dict: not tensors: [{listed(wrong)}]")
    weights = {
        name: value
        for name, value in state.items()
        if not (name.endswith("num_batches_tracked") and value.ndim == 0)  # which nothing reads
    }
    if wrong := [f"{n} {tuple(v.shape)}" for n, v in weights.items() if v.ndim == 0 or v.numel() == 0]:
        raise InputError(f"{path}: weights need at least one axis and no axis of length 0: [{listed(wrong)}]")
    floats = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    if wrong := [f"{n} {v.dtype}" for n, v in weights.items() if v.dtype not in floats]:
        raise InputError(f"{path}: weights must be floating point of 16, 32 or 64 bits: [{listed(wrong)}]")


# ---------------------------------------------------------------- .npz


def load_arrays(path):
    """An .npz -> {name: array}, stored or compressed.

    Each array's header is compared with the size of its part of the archive before anything is allocated.
    InputError if the file is absent, damaged or a bare .npy, if it holds Python objects (a pickle) or two
    arrays of one name, or if it would unpack to more than both ROOM bytes and GROWTH times its size.
    """
    limit = max(ROOM, GROWTH * _file_size(path))
    with opened_npz(path) as archive:
        members = archive.infolist()
        names = [m.filename.removesuffix(".npy") for m in members]
        unpacked = sum(m.file_size for m in members)
        if unpacked > limit:
            raise ValueError(f"it would unpack to {unpacked >> 20} MiB, over {limit >> 20} MiB")
        if len(set(names)) < len(names):
            raise ValueError("two arrays have the same name")
        return {name: _read_array(archive, member) for name, member in zip(names, members)}


@contextlib.contextmanager
def opened_npz(path):
    """The zip archive of an .npz. Whatever goes wrong while it is open is an InputError naming the file."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except Exception as error:  # damage shows as almost any exception
        raise InputError(
            f"{path} is not a plain .npz of arrays: truncated, pickled or damaged ({_reason(error)}); "
            "copy it again from where it came"
        ) from None


def array_header(archive, member):
    """(shape, dtype) of an array of an open .npz. ValueError unless they account for every byte of its part,
    or if it holds Python objects (a pickle). Nothing is allocated."""
    name = member.filename
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name} is compressed in a way that NumPy never uses")
    with archive.open(member) as file:
        headers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
        version = npy.read_magic(file)
        if version not in headers:
            raise ValueError(f"{name} has the unknown .npy version {version}")
        shape, _, dtype = headers[version](file)
        if dtype.hasobject:
            raise ValueError(f"{name} holds Python objects")
        held = member.file_size - file.tell()
    if min(shape, default=1) < 0 or dtype.itemsize == 0 or math.prod(shape) * dtype.itemsize != held:
        raise ValueError(f"{name} claims the shape {_cut(str(shape))} of {dtype} in {held} bytes")
    return shape, dtype


def _read_array(archive, member):
    """One array of the archive; ValueError as of `array_header`."""
    array_header(archive, member)
    with archive.open(member) as file:
        array = npy.read_array(file, allow_pickle=False)
        file.read(1)  # at the end of the data the check sum is verified
    return array
