import pytest
import torch

from gatewright.report.facts import class_label, count, duration, expert_facts, health, routing_summary, warnings


def test_times_numbers_and_names_are_said_as_people_say_them():
    said = {0.04: "0.0 s", 59.94: "59.9 s", 60: "1 min 0 s", 119.6: "2 min 0 s", 3600: "1 h 0 min", 7300: "2 h 1 min"}
    assert {seconds: duration(seconds) for seconds in said} == said
    assert [count(number, "epoch") for number in (0, 1, 2, 1500)] == ["0 epochs", "1 epoch", "2 epochs", "1,500 epochs"]
    names = {"3": "class 3", "1000": "class 1000", "cat": "cat", "3D": "3D", "猫": "猫"}
    assert {name: class_label(name) for name in names} == names


def test_favourites_are_at_most_three_and_never_nothing():
    counts = torch.tensor([[10, 0], [5, 5], [1, 9], [0, 10], [999, 1]])
    favourites = [expert.favourites for expert in expert_facts(counts.sum(0), counts, counts.sum(1), list("abcde"))]
    assert favourites[0] == (("a", 1.0), ("e", pytest.approx(0.999)), ("b", 0.5))
    assert [name for name, _ in favourites[1]] == ["d", "c", "b"]
    assert expert_facts(counts[:1].sum(0), counts[:1], counts[:1].sum(1), ["a"])[1].favourites == ()


def test_an_image_that_goes_to_two_experts_counts_for_both():
    """Ten images of a class, each sent to two of three experts."""
    seen = torch.tensor([[10, 7, 3], [0, 4, 4]])
    facts = expert_facts(seen.sum(0), seen, torch.tensor([10, 4]), ["cat", "dog"])
    said = [expert.favourites_text.replace("\N{NO-BREAK SPACE}", " ") for expert in facts]
    assert said == ["cat 100%", "dog 100%, cat 70%", "dog 100%, cat 30%"]


def test_shares_sum_to_one_and_little_is_not_nothing():
    facts = expert_facts(torch.tensor([1, 2, 5]), None, None, [])
    assert [expert.share for expert in facts] == [0.125, 0.25, 0.625]
    assert not any(expert.dead for expert in facts)
    facts = expert_facts(torch.tensor([1, 0, 99_999]), None, None, [])
    assert [expert.share_text for expert in facts] == ["<0.1%", "0.0%", "100.0%"]


def test_what_a_router_routes(result):
    layer = result["layers"]["net/moe & co"]
    assert routing_summary(layer, 200) == "Router NoisyTopK: 1 of 3 experts for each image."
    assert routing_summary(layer, 50).endswith("for each token, of which each image has 4.")
    assert routing_summary({name: layer[name] for name in layer if name != "router"}, 200) == ""


def test_health_is_the_worst_of_all_layers_and_what_is_odd_is_said_in_words(result):
    layer = result["layers"]["net/moe & co"]
    good = layer | {"tokens_per_expert": [210, 199, 191], "dead_experts": [], "max_over_mean_load": 1.05}
    good |= {"class_by_expert": [[70, 1, 63], [70, 0, 63], [70, 198, 65], [0, 0, 0]], "dropped_fraction": 0.012}
    assert health([good]) == "3 experts, 0 dead, busiest 1.1 times the mean, 1.2% dropped"
    other = layer | {"tokens_per_expert": [1, 1], "dropped_fraction": 0.0}
    assert health([layer, good]) == "2 layers of 3 experts, 1 dead, busiest 2.2 times the mean, 1.2% dropped"
    assert health([layer, other]).startswith("2 layers of 2 or 3 experts, ")
    assert warnings(result | {"layers": {"moe": good}}) == ["Expert 1 of moe sees only images of [red]fox."]
    one_class = {
        "test_accuracy_per_class": {"cat": 1.0},
        "layers": {"moe": good | {"class_by_expert": [[210, 199, 191]]}},
    }
    assert warnings(result | one_class) == []
    assert warnings(result | {"layers": {"moe": good | {"class_by_expert": None}}}) == []
