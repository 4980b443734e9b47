import pytest

from gatewright.data import DataConfig, ImageSplits
from gatewright.tasks import Classification
from gatewright.train import train
from tests.train.runs import digits_config, image_set, write_image_folder


def test_images_that_are_too_small_for_the_model_are_refused_before_they_are_decoded(tmp_path):
    folder = write_image_folder(tmp_path / "images", size=12)
    (folder / "train" / "class1" / "1.png").write_bytes(b"no image")
    config = digits_config(
        tmp_path / "run", recipe="cifar10-cnn", data={"name": "folder", "path": str(folder)}, model={"upcycle_epoch": 0}
    )
    with pytest.raises(ValueError, match="The CNN takes images of at least 16 x 16 pixels; got 12 x 12"):
        train(config)
    assert not list((tmp_path / "cache").glob("*.safetensors"))


def test_too_few_images_are_said():
    def said(num_train, num_holdout):
        splits = ImageSplits(image_set(num_train), image_set(num_holdout), image_set(4))
        return " ".join(Classification().warnings(DataConfig(batch_size=16), splits))

    assert said(16, 2) == ""
    assert "15 training images are fewer than one batch (data.batch_size is 16), " in said(15, 2)
    assert "data.holdout (0.1) of 16 training images is no image, so nothing is evaluated between epochs" in said(16, 0)
