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


@pytest.mark.parametrize(
    ("num_train", "num_holdout", "warnings"),
    [
        (16, 2, []),
        (
            15,
            2,
            [
                "15 training images are fewer than one batch (data.batch_size is 16), ",
                ": set it to 2 or so, and use few experts.",
            ],
        ),
        (16, 0, ["data.holdout (0.1) of 16 training images is no image, so nothing is evaluated between epochs"]),
    ],
)
def test_too_few_images_are_said(num_train, num_holdout, warnings):
    splits = ImageSplits(image_set(num_train), image_set(num_holdout), image_set(4))
    said = Classification().warnings(DataConfig(batch_size=16), splits)
    assert len(said) == bool(warnings)
    assert all(warning in said[0] for warning in warnings)
