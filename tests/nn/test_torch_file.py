"""Files of `torch.save`, `.npz` and `.safetensors` read without torch: the very values, or one line saying why not."""

from __future__ import annotations

import os
import pickle
import struct
import zipfile
from collections import OrderedDict

import ml_dtypes
import numpy as np
import pytest

from stabletrain.errors import DataError
from stabletrain.nn import torch_file
from stabletrain.nn.torch_file import read_arrays, read_torch
from tests.nn import torch_writing as writing

ARRAYS = {
    "conv.weight": np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2) / 7,
    "conv.bias": np.array([1.5, -2.5]),
    "half": np.array([0.5, 65504], np.float16),
    "brain": np.array([1.0, -3.140625, 1e38], ml_dtypes.bfloat16),
    "wave": np.array([1 + 2j, -3j], np.complex64),
    "steps": np.array(7, np.int64),
    "mask": np.array([[True, False]]),
    "none": np.zeros((0, 3), np.float32),
}


def assert_same(read: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert list(read) == list(expected)
    for name, array in expected.items():
        assert read[name].dtype == array.dtype, name
        np.testing.assert_array_equal(read[name], array, err_msg=name)


@pytest.mark.parametrize("save", [writing.save_zip, writing.save_legacy])
def test_every_type_comes_back_bit_for_bit(save, tmp_path):
    assert_same(read_arrays(save(tmp_path / "file.pth", ARRAYS)), ARRAYS)


def test_the_other_kinds_give_the_same_dictionary(tmp_path):
    from safetensors.numpy import save_file

    arrays = {name: array for name, array in ARRAYS.items() if name not in ("brain", "wave")}
    np.savez(tmp_path / "file.npz", **arrays)
    assert_same(read_arrays(tmp_path / "file.npz"), arrays)
    save_file(arrays, tmp_path / "file.safetensors")
    read = read_arrays(tmp_path / "file.safetensors")
    assert_same({name: read[name] for name in arrays}, arrays)


def test_safetensors_of_bfloat16(tmp_path):
    header = b'{"w":{"dtype":"BF16","shape":[1,3],"data_offsets":[0,6]}}'
    path = tmp_path / "file.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + ARRAYS["brain"].tobytes())
    np.testing.assert_array_equal(read_arrays(path)["w"], ARRAYS["brain"][None])


def test_the_kind_is_told_by_the_content_and_not_by_the_name(tmp_path):
    np.savez(tmp_path / "file.npz", a=ARRAYS["half"])
    (tmp_path / "file.npz").rename(tmp_path / "file.pth")
    np.testing.assert_array_equal(read_arrays(tmp_path / "file.pth")["a"], ARRAYS["half"])


def test_views_of_one_storage_share_it(tmp_path):
    values = np.arange(12, dtype=np.float32)
    body = writing.mapping(
        {
            "all": writing.tensor("0", "FloatStorage", 12, (3, 4), (4, 1)),
            "transposed": writing.tensor("0", "FloatStorage", 12, (4, 3), (1, 4)),
            "column": writing.tensor("0", "FloatStorage", 12, (3,), (4,), offset=1),
            "expanded": writing.tensor("0", "FloatStorage", 12, (1000, 2), (0, 1), offset=10),
        }
    )
    read = read_arrays(writing.write_zip(tmp_path / "file.pth", body, {"0": values.tobytes()}))
    np.testing.assert_array_equal(read["transposed"], values.reshape(3, 4).T)
    np.testing.assert_array_equal(read["column"], [1, 5, 9])
    np.testing.assert_array_equal(read["expanded"], np.broadcast_to([10, 11], (1000, 2)))
    assert np.shares_memory(read["all"], read["transposed"])
    assert not read["all"].flags.writeable


def test_a_view_of_before_pytorch_0_4_is_a_part_of_its_storage(tmp_path):
    values = np.arange(6, dtype=np.float32)
    body = writing.mapping(
        {"part": writing.tensor("0", "FloatStorage", 6, (2,), (1,), offset=1, legacy=True, view=("1", 2, 3))}
    )
    path = writing.write_legacy(tmp_path / "file.pth", body, {"0": (6, values.tobytes())})
    np.testing.assert_array_equal(read_arrays(path)["part"], [3, 4])


@pytest.mark.parametrize("order", ["big", None])
def test_byte_order(order, tmp_path):
    values = np.array([1.5, 2 - 1j], np.complex64)
    data = (values.view(np.float32).astype(">f4") if order == "big" else values).tobytes()
    path = writing.write_zip(
        tmp_path / "file.pth", writing.mapping({"w": writing.whole("0", values)}), {"0": data}, order
    )
    np.testing.assert_array_equal(read_arrays(path)["w"], values)


def test_nested_containers_keep_their_tree_and_get_dotted_names(tmp_path):
    w = np.arange(3, dtype=np.float32)
    inner = writing.mapping({"w": writing.whole("0", w)})
    body = b"}(" + writing.text("epoch") + writing.number(3) + writing.text("models") + b"]" + inner + b"au"
    path = writing.write_zip(tmp_path / "file.pt", body, {"0": w.tobytes()})
    tree = read_torch(path)
    assert tree["epoch"] == 3
    assert type(tree["models"][0]) is OrderedDict
    assert_same(read_arrays(path), {"models.0.w": w})


# --- what is refused ------------------------------------------------------------------------------------------


class Hostile:
    def __reduce__(self):
        return os.system, ("touch hostile_was_here",)


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (pickle.dumps(Hostile(), protocol=2)[2:-1], "system"),
        (pickle.dumps({"a": Hostile()}, protocol=2)[2:-1], "system"),
        (b"cbuiltins\neval\n(" + writing.text("1") + b"tR", "builtins.eval"),
        (b"cbuiltins\neval\n", "builtins.eval"),
        (b"ccollections\nOrderedDict\n}b", "collections.OrderedDict"),  # attributes for the class itself
        (b"(ios\nsystem\n", "INST"),
        (b"P1\n", "PERSID"),
        (b"(" + writing.text("module") + b"tQ", "something other than a tensor's storage"),
        (writing.text("a") + b")R", "calls a str"),
        (writing.tensor("0", "QInt8Storage", 1, (1,), (1,)), "torch.QInt8Storage"),
        (b"ctorch._utils\n_rebuild_sparse_tensor\n)R", "torch._utils._rebuild_sparse_tensor"),
    ],
)
def test_anything_but_tensors_and_containers_is_refused_by_name(body, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in (
        writing.write_zip(tmp_path / "zip.pth", body, {}),
        writing.write_legacy(tmp_path / "legacy.pth", body, {}),
    ):
        with pytest.raises(DataError, match=named) as caught:
            read_arrays(path)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "hostile_was_here").exists()


@pytest.mark.parametrize(
    ("shape", "strides", "offset", "count"),
    [
        ((5,), (1,), 0, 4),
        ((2, 2), (4, 1), 0, 4),
        ((1,), (1,), 4, 4),
        ((2,), (-1,), 1, 4),
        ((2**20,) * 4, (1,) * 4, 0, 4),
    ],
)
def test_a_tensor_cannot_reach_beyond_its_storage(shape, strides, offset, count, tmp_path):
    body = writing.mapping({"w": writing.tensor("0", "FloatStorage", count, shape, strides, offset)})
    with pytest.raises(DataError, match="damaged"):
        read_arrays(writing.write_zip(tmp_path / "file.pth", body, {"0": bytes(4 * count)}))


def test_things_that_hold_themselves_end(tmp_path, monkeypatch):
    with pytest.raises(DataError):
        read_arrays(writing.write_zip(tmp_path / "loop.pth", b"]q\x00h\x00a", {}))
    monkeypatch.setattr(torch_file, "MAX_NODES", 10_000)
    doubling = b"]" + b"".join(b"q" + bytes([i]) + b"0](h" + bytes([i]) + b"h" + bytes([i]) + b"e" for i in range(60))
    with pytest.raises(DataError, match="more than"):
        read_arrays(writing.write_zip(tmp_path / "doubling.pth", doubling, {}))


@pytest.mark.parametrize("save", [writing.save_zip, writing.save_legacy])
def test_a_file_cut_short_anywhere_is_an_error_of_one_line(save, tmp_path):
    whole = save(tmp_path / "whole.pth", ARRAYS).read_bytes()
    cut = tmp_path / "cut.pth"
    for length in range(0, len(whole), 37):
        cut.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"cut\.pth") as caught:
            read_arrays(cut)
        assert "\n" not in str(caught.value)


def test_a_flipped_bit_in_a_zip_is_noticed(tmp_path):
    path = writing.save_zip(tmp_path / "file.pth", ARRAYS)
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo("archive/data/0").header_offset
    data[start + 60] ^= 4
    path.write_bytes(data)
    with pytest.raises(DataError, match="damaged"):
        read_arrays(path)


def test_random_damage_is_never_anything_but_a_data_error(tmp_path):
    """Three hundred files with a few changed bytes each: read, or refused, but never another exception."""
    rng = np.random.default_rng(0)
    refused = 0
    for save in (writing.save_zip, writing.save_legacy):
        whole = np.frombuffer(save(tmp_path / "file.pth", ARRAYS).read_bytes(), np.uint8)
        for _ in range(150):
            damaged = whole.copy()
            damaged[rng.integers(0, len(whole), 4)] = rng.integers(0, 256, 4)
            (tmp_path / "damaged.pth").write_bytes(damaged.tobytes())
            try:
                read_arrays(tmp_path / "damaged.pth")
            except DataError:
                refused += 1
    assert refused > 150


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"hello, this is some text", "first bytes"),
        (pickle.dumps({"a": 1}, protocol=2), "torch.save did not write"),
        (pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2) + pickle.dumps(1000, protocol=2), "protocol"),
    ],
)
def test_other_files(content, message, tmp_path):
    (tmp_path / "file.pth").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_arrays(tmp_path / "file.pth")


def test_files_that_hold_something_else(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        read_arrays(tmp_path / "missing.pth")
    with pytest.raises(DataError, match="Is a directory"):
        read_arrays(tmp_path)
    with pytest.raises(DataError, match="no tensors"):
        read_arrays(writing.write_zip(tmp_path / "empty.pth", b"}", {}))
    with pytest.raises(DataError, match="TorchScript"):
        read_arrays(writing.write_zip(tmp_path / "script.pt", b"}", {}, **{"constants.pkl": b""}))
    np.savez(tmp_path / "objects.npz", a=np.array([{}], object))
    with pytest.raises(DataError, match="Python objects"):
        read_arrays(tmp_path / "objects.npz")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(DataError, match="zip archive"):
        read_arrays(tmp_path / "other.zip")


# --- beside torch itself --------------------------------------------------------------------------------------


@pytest.mark.torch
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 4])
def test_what_torch_saves(zipped, protocol, tmp_path):
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(4, 6, generator=generator)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    tree = {
        "network": network.state_dict(),
        "parameter": torch.nn.Parameter(base.clone()),
        "bfloat16": base.bfloat16(),
        "half": base.half(),
        "complex": torch.complex(base, -base),
        "bool": base > 0,
        "int8": base.to(torch.int8),
        "uint16": base.abs().to(torch.uint16),
        "float8": base.to(torch.float8_e4m3fn),
        "transposed": base.T,
        "part": base[1:3, ::2],
        "expanded": base[:, :1].expand(4, 5),
        "channels last": torch.randn(2, 3, 4, 5, generator=generator).to(memory_format=torch.channels_last),
        "scalar": torch.tensor(3),
        "list": [base[0], (base[1], {"inner": base[2]})],
        "size": base.shape,
        "plain": [1, -2.5, True, None, "text", b"bytes", 2**70, {1, 2}],
    }
    path = tmp_path / "file.pth"
    torch.save(tree, path, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    read = read_torch(path)

    def compare(ours, theirs):
        if isinstance(theirs, torch.Tensor):
            name = str(theirs.dtype).removeprefix("torch.")
            assert ours.dtype.name == name
            values = theirs.detach()
            if name in ("bfloat16", "float8_e4m3fn"):
                ours, values = ours.astype(np.float32), values.float()
            np.testing.assert_array_equal(ours, values.numpy())
        elif isinstance(theirs, dict):
            assert list(ours) == list(theirs)
            for key in theirs:
                compare(ours[key], theirs[key])
        elif isinstance(theirs, (list, tuple)):
            assert len(ours) == len(theirs)
            for one, other in zip(ours, theirs, strict=True):
                compare(one, other)
        else:
            assert ours == theirs

    compare(read, tree)


@pytest.mark.torch
def test_the_handwritten_files_are_what_torch_reads(tmp_path):
    torch = pytest.importorskip("torch")
    arrays = {name: array for name, array in ARRAYS.items() if name != "brain"}
    for save in (writing.save_zip, writing.save_legacy):
        read = torch.load(save(tmp_path / "file.pth", arrays), weights_only=True)
        assert_same({name: tensor.numpy() for name, tensor in read.items()}, arrays)


@pytest.mark.torch
def test_objects_of_torch_that_are_no_state_dict_are_refused(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pth")
    with pytest.raises(DataError, match=r"torch\.nn\.modules\.linear\.Linear"):
        read_arrays(tmp_path / "module.pth")
    torch.save({"a": torch.randn(2, dtype=torch.complex64).conj()}, tmp_path / "conjugate.pth")
    with pytest.raises(DataError, match="conj"):
        read_arrays(tmp_path / "conjugate.pth")
    torch.save({"a": torch.eye(3).to_sparse()}, tmp_path / "sparse.pth")
    with pytest.raises(DataError, match="sparse"):
        read_arrays(tmp_path / "sparse.pth")
