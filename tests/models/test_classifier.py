import torch
from torch import nn
from torch.testing import assert_close

from gatewright.data import as_floats, channel_statistics
from gatewright.models import ImageClassifier
from tests.train.runs import image_set


def test_images_are_standardised_per_channel():
    images = image_set(50)
    mean, std = channel_statistics(images)
    model = ImageClassifier(nn.Flatten(), mean.tolist(), std.tolist())
    standardised = model(as_floats(images.images)).view(50, 3, -1)
    assert_close(standardised.mean((0, 2)), torch.zeros(3), atol=1e-4, rtol=0)
    assert_close(standardised.std((0, 2), correction=0), torch.ones(3), atol=1e-4, rtol=0)


def test_the_statistics_travel_with_the_weights():
    saved = ImageClassifier(nn.Linear(4, 2), [0.1, 0.2, 0.3], [1.0, 2.0, 3.0]).state_dict()
    assert set(saved) == {"mean", "std", "network.weight", "network.bias"}
    other = ImageClassifier(nn.Linear(4, 2), [0.0] * 3, [1.0] * 3)
    other.load_state_dict(saved)
    assert_close(other.mean.flatten(), torch.tensor([0.1, 0.2, 0.3]))
    assert_close(other.std.flatten(), torch.tensor([1.0, 2.0, 3.0]))
