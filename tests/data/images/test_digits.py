import torch

from gatewright.data.images.digits import load_digits


def test_digits_are_those_of_scikit_learn_at_full_range():
    from sklearn.datasets import load_digits as load_sklearn_digits  # takes seconds

    splits = load_digits()
    train, test = splits.train, splits.test
    assert (len(train), len(splits.holdout), len(test)) == (1438, 0, 359)
    assert train.images.shape[1:] == test.images.shape[1:] == (1, 8, 8)
    ink = torch.cat([train.images, test.images]).float() * 16 / 255
    assert (ink - ink.round()).abs().max() < 0.05
    labels = torch.cat([train.labels, test.labels])
    pixels, theirs = map(torch.from_numpy, load_sklearn_digits(return_X_y=True))
    ours = torch.cat([ink.round().flatten(1), labels[:, None]], dim=1)
    assert sorted(ours.tolist()) == sorted(torch.cat([pixels, theirs[:, None]], dim=1).tolist())
