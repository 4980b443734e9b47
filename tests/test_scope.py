"""Noise as a function of a key and a token's place, and what a scope adds up."""

from itertools import product

import torch
from torch.testing import assert_close

from gatewright import BatchScope, aux_loss, seed_noise
from gatewright.scope import noise_key, splitmix64
from tests.cases import make_moe


class Part(BatchScope):
    """The tokens of a later process."""

    def token_offset(self, num_tokens):
        return 30


def scope(*numbers):
    return BatchScope(torch.tensor(noise_key(*numbers)))


def test_splitmix64_is_the_published_generator():
    """The first numbers of the reference implementation from the seed 1234567."""
    state = 1234567 + 0x9E3779B97F4A7C15 * torch.arange(1, 4).numpy().astype(object)
    words = torch.tensor([word % 2**64 - (2**64 if word % 2**64 >= 2**63 else 0) for word in state])
    assert [word % 2**64 for word in splitmix64(words).tolist()] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


def test_numbers_belong_to_a_token_however_the_batch_is_split():
    for kind in ["normal", "uniform"]:
        whole = getattr(scope(1), kind)(torch.empty(50, 7))
        assert torch.equal(getattr(Part(scope(1).key), kind)(torch.empty(20, 7)), whole[30:])
        assert torch.equal(getattr(scope(1), kind)(torch.empty(30, 7)), whole[:30])


def test_another_key_or_stream_gives_independent_numbers():
    for kind in ["normal", "uniform"]:
        like = torch.empty(1000, 100)
        first = getattr(scope(1, 2), kind)(like).flatten()
        others = [
            getattr(scope(1, 3), kind)(like),
            getattr(scope(2, 2), kind)(like),
            getattr(scope(1, 2), kind)(like, 1),
        ]
        for other in others:
            correlation = torch.corrcoef(torch.stack([first, other.flatten()]))[0, 1]
            assert correlation.abs() < 5 / len(first) ** 0.5


def test_frequencies():
    """Against the distributions, by the largest difference of the distribution functions (Kolmogorov, p = 1e-6)."""
    like = torch.empty(700, 700)
    for key in (0, noise_key(3)):
        scope = BatchScope(torch.tensor(key))
        uniform, normal = scope.uniform(like), torch.special.ndtr(scope.normal(like))
        for place, drawn in product(
            [(slice(None), 0), (0, slice(None)), (slice(None), slice(None))], [uniform, normal]
        ):
            ordered = drawn[place].double().flatten().sort().values
            expected = (torch.arange(len(ordered)) + 0.5) / len(ordered)
            assert (ordered - expected).abs().max() < 2.7 / len(ordered) ** 0.5
        assert uniform.min() > 0
        assert uniform.max() < 1


def test_without_a_key_noise_is_drawn_from_torchs_generator():
    like = torch.empty(5, 3)
    first, second = BatchScope().normal(like), BatchScope().normal(like)
    torch.manual_seed(0)
    assert not torch.equal(first, second)
    assert torch.equal(BatchScope().normal(like), first)


def test_noise_of_a_seed_and_step_is_the_same_again_and_each_layers_own():
    model = torch.nn.Sequential(make_moe("noisy-top-k"), make_moe("noisy-top-k"))
    model[1].load_state_dict(model[0].state_dict())
    x, outputs = torch.randn(13, 8), []
    for seed, step in ((1, 1), (1, 2), (2, 1), (1, 1)):
        seed_noise(model, seed, step)
        torch.randn(7)  # whatever else draws
        outputs.append(model(x).detach())
        aux_loss(model)
    assert torch.equal(outputs[0], outputs[3])
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    assert not torch.equal(model[0](x), model[1](x))


def test_every_forward_of_a_layer_has_noise_of_its_own():
    moe, x, chosen = make_moe("noisy-top-k"), torch.randn(32, 8), []
    for _ in range(2):
        seed_noise(moe, 0, 5)
        for _ in range(2):
            moe(x)
            chosen.append(moe.routing.expert_index)
    first, second, first_again, second_again = chosen
    assert not first.equal(second)
    assert first.equal(first_again)
    assert second.equal(second_again)


def test_noise_is_computed_in_the_type_it_is_asked_in():
    """float32 numbers are those of float64, rounded; no float64 number is a float32 one by accident."""
    wide, narrow = torch.empty(400, 5, dtype=torch.float64), torch.empty(400, 5)
    for draw in (scope(1).normal, scope(1).uniform):
        assert_close(draw(wide).float(), draw(narrow), rtol=1e-5, atol=1e-6)
    drawn = scope(1).normal(wide)
    assert (drawn != drawn.float().double()).float().mean() > 0.9
