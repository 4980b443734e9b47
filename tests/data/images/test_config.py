import pytest

from gatewright.data import AugmentConfig, DataConfig


def test_names_of_data_sets():
    for name in ["digits", "cifar10", "cifar100", "ylecun/mnist", "some-one/data_set-1.5"]:
        assert DataConfig(name=name).name == name


def test_defaults_change_nothing_and_hold_out_a_tenth():
    config = DataConfig()
    assert (config.name, config.holdout, config.augment) == ("digits", 0.1, AugmentConfig())
    assert config.augment == AugmentConfig(flip=False, translate=0, crop=1.0)


def test_wrong_data_settings():
    for settings, message in [
        ({"name": "cifr10"}, "got 'cifr10': did you mean 'cifar10'?"),
        ({"name": "imagenet"}, "got 'imagenet': a hub data set is written owner/name"),
        ({"name": "a/b/c"}, "got 'a/b/c'"),
        ({"name": "./data"}, "got './data'"),
        ({"name": "folder"}, "'folder' needs data.path"),
        ({"name": "digits", "path": "here"}, "take neither; got path='here', image_size=None: leave them out"),
        ({"name": "digits", "image_size": 16}, "take neither; got path=None, image_size=16: leave them out"),
        ({"holdout": 1.0}, r"share of the training images in \[0, 1\); got 1.0"),
        ({"holdout": -0.1}, "got -0.1"),
        ({"holdout": float("nan")}, "got nan"),
        ({"name": "cifar10", "image_size": 0}, "image_size must be 1 or more; got 0"),
        ({"batch_size": 0}, "batch_size must be 1 or more; got 0"),
        ({"eval_batch_size": -1}, "eval_batch_size must be 1 or more; got -1"),
    ]:
        with pytest.raises(ValueError, match=message):
            DataConfig(**settings)


def test_wrong_augmentation():
    for settings, message in [
        ({"translate": -1}, "translate is a number of pixels, 0 or more; got -1"),
        ({"crop": 0.0}, r"crop is a share of the side in \(0, 1\]; got 0.0"),
        ({"crop": 1.5}, "got 1.5"),
    ]:
        with pytest.raises(ValueError, match=message):
            AugmentConfig(**settings)
