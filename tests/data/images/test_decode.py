import io
import os
import pty

import numpy as np
import pytest
import torch
from PIL import Image

from gatewright.data import decode_image
from gatewright.data.images.decode import decode_source
from gatewright.data.images.sources import EncodedImage, ImageSource
from tests.data.samples import pixels, png


def source(train, test=None):
    """Make a source of image bytes, all of class 0; the test image is the first of training unless given."""
    return ImageSource(
        [EncodedImage(f"train row {row}", data, 0) for row, data in enumerate(train)],
        [],
        [EncodedImage("test row 0", train[0] if test is None else test, 0)],
        ("only",),
    )


def tensor(array):
    return torch.from_numpy(array).view(*array.shape[:2], -1).movedim(2, 0)


def test_pixels_come_back_exactly():
    arrays = [pixels(seed) for seed in range(4)]
    splits = decode_source(source([png(array) for array in arrays[:3]], png(arrays[3])), None)
    train, test = splits.train, splits.test
    assert len(splits.holdout) == 0
    assert torch.equal(train.images, torch.stack([tensor(array) for array in arrays[:3]]))
    assert torch.equal(test.images[0], tensor(arrays[3]))
    assert train.class_names == test.class_names == ("only",)


def test_one_colour_image_makes_the_set_rgb():
    grey, colour = pixels(0, channels=1), pixels(1)
    splits = decode_source(source([png(grey)], png(colour)), None)
    train, test = splits.train, splits.test
    assert torch.equal(train.images[0], tensor(grey).expand(3, -1, -1))
    assert torch.equal(test.images[0], tensor(colour))


@pytest.mark.parametrize(("mode", "channels"), [("1", 1), ("LA", 1), ("P", 3), ("RGBA", 3), ("CMYK", 3), ("I;16", 1)])
def test_modes_of_images(mode, channels):
    image = Image.fromarray(np.arange(300, dtype=np.uint16).reshape(15, 20) * 200)
    if mode != "I;16":
        image = Image.fromarray(pixels(0)).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, "TIFF")
    train = decode_source(source([buffer.getvalue()]), None).train
    assert train.images.shape == (1, channels, image.height, image.width)


def test_sixteen_bits_keep_their_high_byte():
    levels = np.array([[0, 255, 256, 511, 40_000, 65_535]], dtype=np.uint16)
    train = decode_source(source([png(levels)]), None).train
    assert train.images.flatten().tolist() == [0, 0, 1, 1, 156, 255]


@pytest.mark.parametrize(("last", "channels"), [((9, 9, 9), 1), ((9, 9, 8), 3)])
def test_a_palette_of_greys_is_grey(last, channels):
    image = Image.fromarray(np.array([[0, 1, 2]], dtype=np.uint8))
    image.putpalette([200, 200, 200, 7, 7, 7, *last, 1, 2, 3])  # the last colour is not used
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    train = decode_source(source([buffer.getvalue()]), None).train
    assert train.images[0, :, 0].tolist() == [[200, 7, level] for level in last[:channels]]


def test_photographs_are_turned_upright():
    image, exif = Image.fromarray(pixels(0)), Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=exif)
    train = decode_source(source([buffer.getvalue()]), None).train
    assert torch.equal(train.images[0], tensor(pixels(0)).rot90(-1, (1, 2)))


def test_sizes_that_differ():
    images = [png(pixels(0)), png(pixels(1)), png(pixels(2, height=7))]
    with pytest.raises(ValueError, match=r"train row 0 is 5x6 pixels and train row 2 is 5x7: set data.image_size"):
        decode_source(source(images), None)
    splits = decode_source(source(images), 4)
    train, test = splits.train, splits.test
    assert train.images.shape == (3, 3, 4, 4)
    assert test.images.shape == (1, 3, 4, 4)


def test_the_first_shape_is_checked_before_the_others_are_decoded():
    def check(shape):
        raise ValueError(f"refused {shape}")

    with pytest.raises(ValueError, match=r"refused \(3, 6, 5\)"):
        decode_source(source([png(pixels(0)), b"no image"]), None, check)


def test_resizing_cuts_the_overhang_off_evenly():
    wide = np.zeros((4, 12, 3), dtype=np.uint8)
    wide[:, 4:8] = 200
    train = decode_source(source([png(wide)]), 4).train
    assert (train.images == 200).all()


def test_one_file_is_decoded_as_in_training(tmp_path):
    file = tmp_path / "image.png"
    file.write_bytes(png(pixels(0, height=9, width=14)))
    train = decode_source(source([file]), 6).train
    assert torch.equal(decode_image(str(file), channels=3, size=(6, 6)), train.images[0])


def test_files_that_cannot_be_decoded(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no image file .*gone.png"):
        decode_image(tmp_path / "gone.png", channels=3, size=(2, 2))
    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(ValueError, match=r"text.png: cannot be decoded as an image"):
        decode_image(tmp_path / "text.png", channels=3, size=(2, 2))
    with pytest.raises(ValueError, match="got channels=2"):
        decode_image(tmp_path / "text.png", channels=2, size=(2, 2))


def test_progress_shows_on_a_terminal_only(monkeypatch, capsys):
    images = source([png(pixels(0))] * 20)
    for variable in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(variable, raising=False)
    decode_source(images, None)
    assert capsys.readouterr().err == ""
    reader, terminal = pty.openpty()
    with os.fdopen(terminal, "w") as stderr:
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setattr("sys.stderr", stderr)
        decode_source(images, None)
        assert b"decoding images" in os.read(reader, 100_000)
    os.close(reader)
