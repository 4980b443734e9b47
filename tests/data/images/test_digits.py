import torch
from sklearn.datasets import load_digits as load_sklearn_digits

from gatewright.data.images.digits import load_digits


def test_digits_are_those_of_scikit_learn_at_full_range():
    splits = load_digits()
    train, test = splits.train, splits.test
    assert (len(train), len(splits.holdout), len(test)) == (1438, 0, 359)
    assert train.images.shape[1:] == test.images.shape[1:] == (1, 8, 8)
    ink = torch.cat([train.images, test.images]).float() * 16 / 255
    assert ink.round().sum() == load_sklearn_digits().data.sum()
    assert (ink - ink.round()).abs().max() < 0.05
