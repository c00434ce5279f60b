"""NRRD, MetaImage, MRC, npz and npy: voxels and places against files written by hand, and against other readers."""

from __future__ import annotations

import bz2
import gzip
import io
import logging
import zipfile

import numpy as np
import pytest
from volume_files import ORIGIN, SHAPE, SPACING, voxels, write_mha, write_mrc, write_nrrd

from camtrain._errors import InputError
from camtrain.data.manifest_files import read_header, read_image, read_volume
from camtrain.data.volume_raw import MOST_BYTES

LPS = np.diag([-1, -1, 1, 1]) @ np.block([[np.diag(SPACING), np.array(ORIGIN)[:, None]], [0, 0, 0, 1]])
RAS = np.block([[np.diag(SPACING), np.array(ORIGIN)[:, None]], [0, 0, 0, 1]])


def same(path, data, matrix):
    volume, header = read_volume(path), read_header(path)
    assert tuple(volume.shape) == (1, *SHAPE)
    np.testing.assert_array_equal(volume.numpy()[0], data)
    np.testing.assert_allclose(volume.affine, matrix, rtol=1e-6)
    assert header.shape == SHAPE
    np.testing.assert_allclose(header.affine, matrix, rtol=1e-6)
    np.testing.assert_allclose(header.spacing, np.linalg.norm(np.asarray(matrix)[:3, :3], axis=0), rtol=1e-6)
    assert np.dtype(header.dtype).newbyteorder("=") == data.dtype
    assert read_image(path).numpy().dtype == np.float32


@pytest.mark.parametrize("dtype", ["i1", "u1", "i2", "u2", "f4", "f8"])
@pytest.mark.parametrize("endian", ["little", "big"])
def test_nrrd(tmp_path, dtype, endian):
    data = voxels(dtype)
    same(write_nrrd(tmp_path / "a.nrrd", data, endian=endian), data, LPS)


@pytest.mark.parametrize(
    ("encoding", "pack"), [("gzip", gzip.compress), ("bzip2", bz2.compress), ("gz", gzip.compress)]
)
def test_packed_nrrd(tmp_path, encoding, pack):
    data = voxels()
    same(write_nrrd(tmp_path / "a.nrrd", data, encoding, pack=pack), data, LPS)


@pytest.mark.parametrize(("space", "matrix"), [("RAS", RAS), ("LAS", np.diag([-1, 1, 1, 1]) @ RAS), ("LPS", LPS)])
def test_spaces_of_nrrd(tmp_path, space, matrix):
    same(write_nrrd(tmp_path / "a.nrrd", voxels(), space=space), voxels(), matrix)


def test_nrrd_with_voxels_beside_it(tmp_path):
    data = voxels("u2")
    (tmp_path / "voxels.raw").write_bytes(data.tobytes(order="F"))
    write_nrrd(tmp_path / "a.nhdr", data, extra="data file: voxels.raw", pack=lambda _: b"")
    same(tmp_path / "a.nhdr", data, LPS)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("msb", [False, True])
@pytest.mark.parametrize("dtype", ["u1", "i2", "u2", "f4"])
def test_metaimage(tmp_path, dtype, msb, packed):
    data = voxels(dtype)
    same(write_mha(tmp_path / "a.mha", data, packed, msb), data, LPS)
    same(write_mha(tmp_path / "b.mhd", data, packed, msb, file="b.raw"), data, LPS)


def test_turned_metaimage(tmp_path):
    """The second voxel axis runs to the back in LPS, the first upwards: columns of the matrix are voxel axes."""
    path = write_mha(tmp_path / "a.mha", voxels(), TransformMatrix="0 0 1 0 1 0 1 0 0")
    affine = read_volume(path).affine.numpy()
    np.testing.assert_allclose(affine[:3, 0], [0, 0, 0.5])
    np.testing.assert_allclose(affine[:3, 1], [0, -1.5, 0])
    np.testing.assert_allclose(affine[:3, 2], [-3.0, 0, 0])


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("dtype", ["i1", "i2", "u2", "f4", "f2"])
def test_mrc(tmp_path, dtype, order):
    data = voxels(dtype)
    same(write_mrc(tmp_path / "a.mrc", data, order), data, RAS)
    same(write_mrc(tmp_path / "a.rec", data, order, extended=b"x" * 96), data, RAS)


def test_mrc_axes_are_put_in_order(tmp_path):
    data = voxels("f4")
    stored = np.ascontiguousarray(data.transpose(2, 0, 1))  # columns are z, rows x, sections y
    path = write_mrc(tmp_path / "a.mrc", stored, axes=(3, 1, 2))
    np.testing.assert_array_equal(read_volume(path).numpy()[0], data)
    assert read_header(path).shape == SHAPE


def test_mrc_with_a_wrong_stamp_is_read_and_told(tmp_path, caplog):
    data = voxels("i2")
    np.testing.assert_array_equal(read_volume(write_mrc(tmp_path / "a.mrc", data, ">", stamp="<")).numpy()[0], data)
    assert "other byte order" in caplog.text


def test_bytes_of_imod_are_unsigned(tmp_path):
    data = np.full(SHAPE, 200, np.uint8)
    np.testing.assert_array_equal(read_volume(write_mrc(tmp_path / "a.mrc", data, imod=True)).numpy()[0], data)


@pytest.mark.parametrize("dtype", ["u1", "i2", ">i2", "f4", "f8", "?"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_numpy(tmp_path, dtype, order):
    data = np.array(voxels().astype(dtype), order=order)
    np.save(tmp_path / "a.npy", data)
    np.savez_compressed(tmp_path / "a.npz", ct=data)
    np.savez(tmp_path / "b.npz", image=data, other=data, affine=LPS)
    for name, matrix in (("a.npy", np.eye(4)), ("a.npz", np.eye(4)), ("b.npz", LPS)):
        volume = read_volume(tmp_path / name)
        np.testing.assert_array_equal(volume.numpy()[0], data)
        np.testing.assert_allclose(volume.affine, matrix)
        assert read_header(tmp_path / name).shape == SHAPE
    np.savez(tmp_path / "c.npz", x=data, spacing=np.array(SPACING))
    np.testing.assert_allclose(read_header(tmp_path / "c.npz").spacing, SPACING)


# ---- wrong files --------------------------------------------------------------------------------------------------


def refused(path, *words):
    for read in (read_volume, read_header):
        try:
            read(path)
        except InputError as error:
            said = str(error)
            assert "\n" not in said
            for word in (path.name, *words):
                assert word in said, said
            if read is read_header:
                return
    with pytest.raises(InputError):
        read_volume(path)


@pytest.mark.parametrize("name", ["a.nrrd", "a.mha", "a.mrc", "a.npy", "a.npz", "a.nii"])
@pytest.mark.parametrize("content", [b"", b"\0" * 40, b"hello, world\n" * 200, b"\xff" * 3000])
def test_files_of_another_format(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, "expected")


@pytest.mark.parametrize("name", ["a.nrrd", "g.nrrd", "a.mha", "z.mha", "a.mrc", "a.npy", "a.npz"])
def test_truncated_files(tmp_path, name):
    data, path = voxels("f4"), tmp_path / name
    {
        "a.nrrd": lambda: write_nrrd(path, data),
        "g.nrrd": lambda: write_nrrd(path, data, "gzip", pack=gzip.compress),
        "a.mha": lambda: write_mha(path, data),
        "z.mha": lambda: write_mha(path, data, packed=True),
        "a.mrc": lambda: write_mrc(path, data),
        "a.npy": lambda: np.save(path, data),
        "a.npz": lambda: np.savez_compressed(path, data),
    }[name]()
    read_volume(path)
    path.write_bytes(path.read_bytes()[:-30])
    refused(path, "truncated")


def test_object_arrays_run_nothing(tmp_path):
    class Harm:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    harm = np.array([[[Harm()]]], dtype=object)
    np.save(tmp_path / "a.npy", harm, allow_pickle=True)
    np.savez(tmp_path / "a.npz", image=harm)
    np.save(tmp_path / "r.npy", np.zeros((2, 2, 2), dtype=[("r", "u1"), ("g", "u1")]))
    refused(tmp_path / "a.npy", "object array")
    refused(tmp_path / "a.npz", "object array")
    refused(tmp_path / "r.npy", "expected one number per voxel")


def _npy(shape, body):
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<i2", "fortran_order": False, "shape": shape})
    return stream.getvalue() + body


def test_zip_bombs_are_not_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "promise.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("image.npy", _npy((1 << 14, 1 << 14, 1 << 14), b"\0" * 1000))
    refused(tmp_path / "promise.npz", f"at most {MOST_BYTES >> 30} GiB", "8.19e+03 GiB")
    with zipfile.ZipFile(tmp_path / "more.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("image.npy", _npy((2, 2, 2), b"\0" * (1 << 24)))
    with pytest.raises(InputError, match=r"more behind them in .*more\.npz.*zip bomb"):
        read_volume(tmp_path / "more.npz")


def test_an_npz_with_several_volumes_or_none(tmp_path):
    np.savez(tmp_path / "two.npz", a=voxels(), b=voxels())
    np.savez(tmp_path / "none.npz", a=np.arange(3))
    refused(tmp_path / "two.npz", "got a, b", "under the name 'image'")
    refused(tmp_path / "none.npz", "got a")


@pytest.mark.parametrize("write", [write_nrrd, write_mha])
def test_four_axes(tmp_path, write):
    name = "a.nrrd" if write is write_nrrd else "a.mha"
    path = write(tmp_path / name, voxels("i2", (2, 3, 4, 5)))
    assert read_header(path).shape == (2, 3, 4, 5)
    with pytest.raises(InputError, match=r"expected a 3D volume, got shape \(2, 3, 4, 5\)"):
        read_volume(path)


def test_other_contents_that_are_refused(tmp_path):
    refused(write_mha(tmp_path / "rgb.mha", voxels(), ElementNumberOfChannels=3), "colours")
    refused(write_mha(tmp_path / "list.mhd", voxels(), file="LIST"), "one data file")
    refused(write_mrc(tmp_path / "complex.mrc", voxels("f4"), mode=4), "mode 4 (complex numbers)")
    refused(write_mrc(tmp_path / "stack.mrc", voxels("f4"), w10=2, w23=401), "a stack of 3")
    refused(write_nrrd(tmp_path / "ascii.nrrd", voxels(), "ascii"), "encoding raw, gzip or bzip2")
    refused(write_nrrd(tmp_path / "endian.nrrd", voxels(), endian="middle"), "endian")
    refused(write_nrrd(tmp_path / "type.nrrd", voxels(), extra="type: block"), "expected numbers")
    refused(write_nrrd(tmp_path / "space.nrrd", voxels(), space="scanner-xyz"), "patient space")
    outside = tmp_path / "outside.raw"
    outside.write_bytes(voxels().tobytes())
    (tmp_path / "in").mkdir()
    write_nrrd(tmp_path / "in" / "a.nhdr", voxels(), extra="data file: ../outside.raw")
    refused(tmp_path / "in" / "a.nhdr", "beside")


def test_a_scan_without_orientation_is_told(tmp_path, caplog):
    text = write_nrrd(tmp_path / "a.nrrd", voxels()).read_bytes()
    (tmp_path / "a.nrrd").write_bytes(text.replace(b"space: left-posterior-superior\n", b""))
    with caplog.at_level(logging.INFO):
        read_volume(tmp_path / "a.nrrd")
        np.save(tmp_path / "a.npy", voxels())
        read_volume(tmp_path / "a.npy")
    levels = [r.levelname for r in caplog.records if "does not say where left" in r.message]
    assert levels == ["WARNING", "INFO"]


# ---- the same files, read by others -------------------------------------------------------------------------------


def oblique():
    """Three axes at right angles, along none of the world's: columns are the directions of the voxel's axes (LPS)."""
    turned, _ = np.linalg.qr(np.array([[0.9, -0.3, 0.2], [0.35, 0.8, -0.4], [-0.1, 0.45, 0.85]]))
    return turned * np.sign(np.diag(turned)) * [1, -1, 1]


def test_other_readers_say_the_same(tmp_path):
    """ITK writes an oblique volume with three spacings in each format; it is read as ITK's own NIfTI of it is."""
    sitk = pytest.importorskip("SimpleITK")
    rng = np.random.default_rng(0)
    image = sitk.GetImageFromArray(rng.integers(-1000, 1000, (6, 5, 4)).astype(np.int16))
    image.SetSpacing(SPACING)
    image.SetOrigin(ORIGIN)
    image.SetDirection(oblique().ravel().tolist())
    sitk.WriteImage(image, str(tmp_path / "a.nii.gz"))
    reference = read_volume(tmp_path / "a.nii.gz")
    for name, packed in (("a.nrrd", True), ("b.nrrd", False), ("a.mha", True), ("a.mhd", False), ("b.mhd", True)):
        sitk.WriteImage(image, str(tmp_path / name), useCompression=packed)
        volume = read_volume(tmp_path / name)
        np.testing.assert_array_equal(volume.numpy(), reference.numpy())
        np.testing.assert_allclose(volume.affine, reference.affine, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("endian", ["little", "big"])
@pytest.mark.parametrize("dtype", ["i2", "f4"])
def test_itk_reads_the_same_out_of_oblique_files(tmp_path, dtype, endian, packed):
    """Files written by hand in both byte orders: every voxel, and the place of every corner."""
    sitk = pytest.importorskip("SimpleITK")
    data = (voxels("f8") * 1.25).astype(dtype)
    axes = (oblique() * SPACING).T  # one row for each axis of the voxel
    coding = {"encoding": "gzip", "pack": gzip.compress} if packed else {}
    spaces = ("left-posterior-superior", "right-anterior-superior", "left-anterior-superior")
    nrrds = [
        write_nrrd(tmp_path / f"{space}.nrrd", data, endian=endian, space=space, axes=axes.tolist(), **coding)
        for space in spaces
    ]
    turn = " ".join(f"{v:.17g}" for v in oblique().T.ravel())
    mha = write_mha(tmp_path / "a.mha", data, packed, endian == "big", TransformMatrix=turn)
    for path in (*nrrds, mha):
        itk, ours = sitk.ReadImage(str(path)), read_volume(path)
        np.testing.assert_array_equal(ours.numpy()[0], sitk.GetArrayFromImage(itk).T)
        assert read_header(path).spacing == pytest.approx(itk.GetSpacing())
        for corner in np.ndindex(2, 2, 2):
            index = [c * (n - 1) for c, n in zip(corner, SHAPE, strict=True)]
            place = ours.affine.numpy() @ [*index, 1]
            np.testing.assert_allclose(place[:3], itk.TransformIndexToPhysicalPoint(index) * np.array([-1, -1, 1]))


def test_mrcfile_says_the_same(tmp_path):
    mrcfile = pytest.importorskip("mrcfile")
    data = np.random.default_rng(0).normal(size=(6, 5, 4)).astype(np.float32)
    with mrcfile.new(tmp_path / "a.mrc") as mrc:
        mrc.set_data(data)
        mrc.voxel_size = (5, 15, 30)
    volume = read_volume(tmp_path / "a.mrc")
    np.testing.assert_array_equal(volume.numpy()[0], data.T)
    np.testing.assert_allclose(volume.affine.numpy(), np.diag([0.5, 1.5, 3.0, 1]), rtol=1e-6)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("dtype", ["i1", "i2", "u2", "f2", "f4"])
def test_mrcfile_reads_the_same_in_both_byte_orders(tmp_path, dtype, order):
    mrcfile = pytest.importorskip("mrcfile")
    path = write_mrc(tmp_path / "a.mrc", voxels(dtype), order, extended=b"\1" * 160)
    with mrcfile.open(path, permissive=True) as mrc:
        ours = read_volume(path)
        np.testing.assert_array_equal(ours.numpy()[0], mrc.data.T)
        steps = [float(mrc.voxel_size[axis]) / 10 for axis in "xyz"]  # angstrom to nm
        origin = [float(mrc.header.origin[axis]) / 10 for axis in "xyz"]
    np.testing.assert_allclose(read_header(path).spacing, steps, rtol=1e-6)
    np.testing.assert_allclose(ours.affine[:3, 3], origin, rtol=1e-6)
