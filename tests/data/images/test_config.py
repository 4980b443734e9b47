import pytest

from gatewright.data import AugmentConfig, DataConfig


def test_wrong_data_settings():
    for settings, message in [
        ({"name": "cifr10"}, "got 'cifr10'; did you mean 'cifar10'?"),
        ({"name": "a/b/c"}, "got 'a/b/c'"),
        ({"name": "folder"}, "`data.name=folder` needs `data.path`"),
        (
            {"name": "digits", "path": "here"},
            "they take neither `data.path` nor `data.image_size`; got 'here' and None",
        ),
        ({"batch_size": 0}, "`data.batch_size` should be greater than 0; got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            DataConfig(**settings)
    with pytest.raises(ValueError, match=r"`data.augment.crop` should be greater than 0; got 0.0"):
        AugmentConfig(crop=0.0)
