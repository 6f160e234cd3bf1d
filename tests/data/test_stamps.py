import collections
import hashlib
import sys

import numpy as np
import pytest

from jaxopt_models import data

# Of the package's version 2022.06.04-1.
SIZES = (392, 122, 113)
CATEGORIES = {"animals": 146, "symbols": 89, "town": 78, "food": 67, "seasonal": 59, "plants": 39}


def full():
    try:
        return data.tux_paint()
    except FileNotFoundError as error:
        pytest.skip(str(error))


def fold(path):
    """The md5 modulo five, by long division of its bytes; 256 is 1 more than 255."""
    return sum(hashlib.md5(path[: -len(".png")].encode()).digest()) % 5


@pytest.fixture
def folder(tmp_path):
    """Stamps without pictures: reading captions needs no Pillow."""
    for i in range(40):
        stamp = tmp_path / ("food" if i % 2 else "animals/birds") / f"{i:02}"
        stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp.with_suffix(".png").write_bytes(b"no image")
        stamp.with_suffix(".txt").write_text(f"  Stamp {i}—ü. \nfr.utf8=Le {i}.\n", "utf-8")
    return tmp_path


def test_the_published_set_has_its_sizes():
    stamps = full()
    parts = stamps.split()
    assert tuple(len(part.paths) for part in parts) == SIZES
    assert repr(stamps) == "Stamps(627 captioned images, 16 categories)"
    counts = collections.Counter(stamps.categories)
    assert {name: counts[name] for name in CATEGORIES} == CATEGORIES
    assert len(set(stamps.captions)) == 577
    captions = dict(zip(stamps.paths, stamps.captions, strict=True))
    assert captions["animals/birds/cartoon/tux.png"] == "Tux—the Linux mascot!"
    assert stamps.folds.tolist() == [fold(path) for path in stamps.paths]


def test_published_images_can_all_be_read():
    pytest.importorskip("PIL")
    stamps = full()
    images = stamps.images(size=16)
    assert images.shape == (627, 16, 16, 3) and images.dtype == np.uint8
    # They are cut out of what was around them, so a corner is white, but hardly an image is.
    assert np.mean((images[:, 0, 0] == 255).all(-1)) > 0.95
    blank = images.reshape(627, -1).min(1) > 240
    assert [stamps.paths[i] for i in np.flatnonzero(blank)] == ["naturalforces/lightningbolt.png"]


def test_a_folder_is_read_and_split_by_its_paths(folder):
    stamps = data.tux_paint(folder)
    wanted = sorted(("food" if i % 2 else "animals/birds") + f"/{i:02}.png" for i in range(40))
    assert stamps.paths == tuple(wanted)
    assert stamps.captions == tuple(f"Stamp {int(path[-6:-4])}—ü." for path in wanted)
    assert stamps.categories == tuple(path.split("/")[0] for path in wanted)
    assert stamps.folds.tolist() == [fold(path) for path in wanted]
    train, validation, test = stamps.split()
    for part, folds in ((train, {2, 3, 4}), (validation, {1}), (test, {0})):
        rows = [i for i, path in enumerate(wanted) if fold(path) in folds]
        assert part.folder == folder and len(rows) > 2
        for name in ("paths", "captions", "categories"):
            assert getattr(part, name) == tuple(getattr(stamps, name)[i] for i in rows)
        assert part.folds.tolist() == [fold(wanted[i]) for i in rows]
        assert not part.folds.flags.writeable
    assert not stamps.folds.flags.writeable


def test_what_is_no_captioned_stamp_is_left_out(folder):
    names = "symbols/alphabets/a", "symbols/clock", "symbols/empty", "symbols/bare"
    (folder / "symbols/alphabets").mkdir(parents=True)
    for name in names:
        (folder / name).with_suffix(".png").write_bytes(b"no image")
        (folder / name).with_suffix(".txt").write_text("Words.\n")
    (folder / "symbols/clock.png").unlink()
    (folder / "symbols/bare.txt").unlink()
    (folder / "symbols/empty.txt").write_text("\nfr.utf8=Rien.\n")
    assert set(data.tux_paint(folder).categories) == {"animals", "food"}
    (folder / "symbols/empty.txt").write_bytes(b"\xff\n")
    with pytest.raises(ValueError, match=r"empty\.txt: the caption is no UTF-8"):
        data.tux_paint(folder)


def drawn(folder, name, mode, size, color):
    image = pytest.importorskip("PIL.Image")
    path = folder / f"{name}.png"
    image.new(mode, size, color).save(path)
    path.with_suffix(".txt").write_text("A colour.\n")


def test_images_lie_on_white_in_the_middle_of_a_square(tmp_path):
    drawn(tmp_path, "a_wide", "RGB", (8, 4), (10, 20, 30))
    drawn(tmp_path, "b_high", "LA", (2, 8), (0, 255))
    drawn(tmp_path, "c_half", "RGBA", (8, 8), (255, 0, 0, 51))
    drawn(tmp_path, "d_clear", "RGBA", (4, 4), (0, 0, 0, 0))
    stamps = data.tux_paint(tmp_path)
    assert stamps.categories == ("a_wide.png", "b_high.png", "c_half.png", "d_clear.png")
    wide, high, half, clear = stamps.images(size=8)
    wanted = np.full((8, 8, 3), 255)
    wanted[2:6] = 10, 20, 30
    np.testing.assert_array_equal(wide, wanted)
    wanted[:] = 255
    wanted[:, 3:5] = 0
    np.testing.assert_array_equal(high, wanted)
    # A fifth of red over white.
    np.testing.assert_array_equal(half, np.full((8, 8, 3), (255, 204, 204)))
    np.testing.assert_array_equal(clear, np.full((8, 8, 3), 255))
    small = stamps.image(2, size=3)
    assert small.shape == (3, 3, 3) and small.dtype == np.uint8
    np.testing.assert_array_equal(small, np.full((3, 3, 3), (255, 204, 204)))
    for part in stamps.split():
        for i, path in enumerate(part.paths):
            alone = stamps.image(stamps.paths.index(path), size=8)
            np.testing.assert_array_equal(part.image(i, size=8), alone)
    nothing = data.Stamps(tmp_path, (), (), (), np.zeros(0, np.uint8))
    assert nothing.images(size=8).shape == (0, 8, 8, 3)


def test_images_that_cannot_be_read_say_which(folder, monkeypatch):
    pytest.importorskip("PIL")
    stamps = data.tux_paint(folder)
    with pytest.raises(ValueError, match=r"birds/00\.png: no image, or a damaged one"):
        stamps.image(0)
    with pytest.raises(IndexError, match="index=40 of 40 images"):
        stamps.image(40)
    with pytest.raises(IndexError, match="index=-1 of 40 images"):
        stamps.image(-1)
    with pytest.raises(ValueError, match="size=0; give a number"):
        stamps.image(0, size=0)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match="pip install pillow"):
        stamps.images()


def test_missing_stamps_say_where_they_were_sought(folder, tmp_path_factory, monkeypatch):
    empty = tmp_path_factory.mktemp("empty")
    monkeypatch.setattr("jaxopt_models.data._stamps.FOLDER", "/nowhere/stamps")
    monkeypatch.delenv("JAXOPT_MODELS_TUX_PAINT", raising=False)
    with pytest.raises(FileNotFoundError, match="JAXOPT_MODELS_TUX_PAINT is not set") as caught:
        data.tux_paint()
    assert "/nowhere/stamps (system folder): no such folder" in str(caught.value)
    assert "apt-get install tuxpaint-stamps-default" in str(caught.value)
    monkeypatch.setenv("JAXOPT_MODELS_TUX_PAINT", str(empty))
    with pytest.raises(FileNotFoundError) as caught:
        data.tux_paint()
    assert f"{empty} (JAXOPT_MODELS_TUX_PAINT): no PNG file with a caption" in str(caught.value)
    assert "is not set" not in str(caught.value)
    monkeypatch.setenv("JAXOPT_MODELS_TUX_PAINT", str(folder))
    assert len(data.tux_paint().paths) == 40
    monkeypatch.setattr("jaxopt_models.data._stamps.FOLDER", str(folder))
    monkeypatch.setenv("JAXOPT_MODELS_TUX_PAINT", str(empty))
    assert len(data.tux_paint().paths) == 40  # The second place is looked at, too.
    with pytest.raises(FileNotFoundError, match=r"\(folder\): no PNG file") as caught:
        data.tux_paint(empty)
    assert "system folder" not in str(caught.value)
