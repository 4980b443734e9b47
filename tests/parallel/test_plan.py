"""Plans beside what real steps on 1, 2 and 4 processes kept, sent and reduced."""

import contextlib

import pytest
import torch

from gatewright import GroupedFeedForward, MergedMoE, ModuleExperts, MoE, Soft, SoftMoE, TopK
from gatewright.models import DigitsConfig, ImageClassifier, ResNetsConfig, TransformerConfig
from gatewright.planner import feed_forward_sizes, measure_sizes, plan
from gatewright.planner.measure import measure
from gatewright.planner.plan import predict_memory
from tests.parallel import plans

CLOSE = 0.1
LAYOUTS = [(2, 1), (4, 2)]


@pytest.fixture(scope="module")
def steps(ranks):
    """Real steps of 7 experts on 101 tokens, both odd on purpose, by layout and optimizer."""
    made = {}

    def made_once(world, ep_size, optimizer="adamw", activation="gelu"):
        key = world, ep_size, optimizer, activation
        if key not in made:
            made[key] = ranks(world, plans.step, ep_size, 7, 101, activation, optimizer)
        return made[key]

    return made_once


@pytest.mark.distributed
@pytest.mark.parametrize(("world", "ep_size"), LAYOUTS)
def test_bytes_of_a_known_routing_are_exact(steps, world, ep_size):
    sizes, results = plans.sizes_of(7, 101), steps(world, ep_size)
    for rank, result in enumerate(results):
        place, first = rank % ep_size, rank - rank % ep_size  # in its row of the mesh, which has all experts
        peers = [results[first + other]["rows"] for other in range(ep_size) if other != place]
        sent_rows = sum(result["rows"]) - result["rows"][place]
        assert result["sent"] == plans.routed_bytes(sizes, sent_rows, sum(rows[place] for rows in peers))
    assert (sum(result["sent"] for result in results) > 0) == (ep_size > 1)


@pytest.mark.distributed
def test_bytes_of_random_routing_are_those_expected(ranks):
    """1,024 assignments to 8 experts: the share that leaves a process has a deviation of at most 1.6 %."""
    results = ranks(4, plans.step, 2, 8, 512, "gelu", "sgd")
    expected = plan(plans.sizes_of(8, 512), 4, 2).traffic.all_to_all
    assert sum(result["sent"] for result in results) / 4 == pytest.approx(expected, rel=0.08)


@pytest.mark.distributed
@pytest.mark.parametrize(("world", "ep_size"), LAYOUTS)
def test_reduced_gradients_are_exact(steps, world, ep_size):
    """Of the process with the most experts; with ep size 1 DDP reduces the experts' gradients with the others."""
    traffic, results = plan(plans.sizes_of(7, 101), world, ep_size).traffic, steps(world, ep_size)
    for result in results:
        if ep_size == 1:
            assert result["dense_reduced"] == traffic.dense_reduced + traffic.expert_reduced
        else:
            assert result["dense_reduced"] == traffic.dense_reduced
    assert max(result["expert_reduced"] for result in results) == (traffic.expert_reduced if ep_size > 1 else 0)
    assert (traffic.expert_reduced > 0) == (world > ep_size)


@pytest.mark.distributed
@pytest.mark.parametrize(("world", "ep_size", "optimizer"), [(2, 1, "adamw"), (4, 4, "sgd")])
def test_weights_gradients_and_optimizer_state_are_exact(steps, world, ep_size, optimizer):
    memory = plan(plans.sizes_of(7, 101, optimizer=optimizer), world, ep_size).memory
    results = steps(world, ep_size, optimizer)
    for name in ("weights", "gradients", "optimizer"):
        assert max(result[name] for result in results) == getattr(memory, name)
    assert max(result["counters"] for result in results) <= 4 * 20  # AdamW's step counts are not planned


@pytest.mark.distributed
def test_activations_of_several_processes_are_close(ranks):
    """Of the process with the most rows, told how many those are."""
    sizes = plans.sizes_of(8, 512, "swiglu", router=TopK)
    kept = ranks(4, plans.kept, 4, 8, 512, "swiglu")
    mean = 512 * plans.TOP_K / 4
    imbalance = max(rows for _, rows in kept) / mean
    assert 1 < imbalance < 2
    predicted = predict_memory(sizes, 4, 4, imbalance).activations
    assert max(found for found, _ in kept) == pytest.approx(predicted, rel=CLOSE)


@pytest.mark.parametrize(
    ("activation", "precision", "num_experts", "tokens"),
    [("gelu", "float32", 4, 1024), ("swiglu", "bfloat16", 16, 257)],
)
def test_activations_of_feed_forward_experts_are_close(activation, precision, num_experts, tokens):
    torch.manual_seed(0)
    half = precision == "bfloat16"
    experts = GroupedFeedForward(num_experts, 64, 96, activation=activation)
    model = MoE(TopK(64, num_experts, 2), experts)
    items = torch.randn(tokens, 64, dtype=torch.bfloat16 if half else torch.float32, requires_grad=True)
    context = torch.autocast("cpu", torch.bfloat16) if half else contextlib.nullcontext()
    found = measure(model, items, [experts], lambda: context)
    sizes = feed_forward_sizes(
        tokens=tokens,
        dim=64,
        ffn=96,
        num_experts=num_experts,
        top_k=2,
        matrices=3 if activation == "swiglu" else 2,
        row_bytes=2 if half else 4,
    )
    predicted = plan(sizes, 1, 1).memory.activations
    assert found.inside.saved + found.outside.saved == pytest.approx(predicted, rel=CLOSE)


def on_meta(config, shape):
    with torch.device("meta"):
        return ImageClassifier(config.build(shape, 10), [0.0] * shape[0], [1.0] * shape[0])


def doubled(parameters):
    return 2 * sum(parameter.numel() for parameter in parameters)


@pytest.mark.parametrize(
    ("config", "shape", "half", "learned"),
    [
        (DigitsConfig(num_experts=4, top_k=2), (1, 8, 8), False, True),
        (DigitsConfig(num_experts=1), (1, 8, 8), False, False),
        (ResNetsConfig(num_experts=3, top_k=1, router="top-k"), (3, 32, 32), True, False),
        (ResNetsConfig(num_experts=3, top_k=2, stem_depth=1), (3, 16, 16), False, True),
    ],
    ids=["digits", "dense", "resnets", "stem"],
)
def test_a_network_is_measured_without_its_memory(config, shape, half, learned):
    """Activations, parameters and rows sent of the real network, at another batch size than those measured."""

    def context():
        return torch.autocast("cpu", torch.bfloat16) if half else contextlib.nullcontext()

    sizes = measure_sizes(
        on_meta(config, shape), lambda count: torch.rand(count, *shape), items=37, state=doubled, context=context
    )
    torch.manual_seed(0)
    real = ImageClassifier(config.build(shape, 10), [0.0] * shape[0], [1.0] * shape[0])
    parts = [real.network.mixture.experts] if config.num_experts > 1 else []
    found = measure(real, torch.rand(37, *shape), parts, context)
    memory = plan(sizes, 1, 1).memory
    assert memory.weights == sum(parameter.nbytes for parameter in real.parameters())
    assert memory.optimizer == 2 * memory.weights
    assert found.inside.saved + found.outside.saved == pytest.approx(memory.activations, rel=CLOSE)
    if parts:
        ((arrived, returned),) = found.trips
        assert len(arrived) == 37 * sizes.top_k == 37 * config.top_k
        assert (sizes.sent_bytes, sizes.returned_bytes) == (arrived[0].nbytes, returned[0].nbytes)
        assert sizes.item_gradient == arrived.requires_grad == learned


def test_what_is_saved_is_counted_once_and_without_parameters():
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2))
    found = measure(model, torch.randn(7, 3))
    assert found.inside.saved == 0
    assert found.outside.saved == 4 * 7 * (3 + 5)  # the input, and what Tanh returns and Linear takes
    assert found.outside.flops == 2 * 7 * (3 * 5 + 5 * 2)
    apart = measure(model, torch.randn(7, 3), [model[0], model[2]])
    assert (apart.inside.flops, apart.outside.flops, len(apart.trips)) == (found.outside.flops, 0, 2)


def test_operations_of_a_network_are_counted():
    model = torch.nn.Sequential(torch.nn.Tanh(), torch.nn.ReLU(), torch.nn.Tanh())
    found = measure(model, torch.rand(3), [model[1]])
    assert (found.inside.operations, found.outside.operations) == (1, 2)
    few, many = (
        measure_sizes(
            on_meta(DigitsConfig(num_experts=count, top_k=2), (1, 8, 8)),
            lambda count: torch.rand(count, 1, 8, 8),
            items=64,
            state=doubled,
        )
        for count in (2, 40)
    )
    assert few.expert.operations == pytest.approx(many.expert.operations, abs=2)
    assert few.expert.operations > 1


@pytest.mark.parametrize("experts", ["grouped", "modules"])
def test_a_language_model_is_measured_with_all_its_layers(experts):
    """A window is an item of many tokens, which stays on one process."""
    config = TransformerConfig(
        num_layers=3, dim=16, num_heads=2, num_experts=4, top_k=2, experts=experts, router_options={"jitter": 0.01}
    )
    with torch.device("meta"):
        network = config.build(11, 10, 10)
    sizes = measure_sizes(network, lambda count: torch.randint(0, 10, (count, 6)), items=5, state=doubled)
    assert (sizes.layers, sizes.num_experts, sizes.top_k) == (3, 4, 2)
    assert (sizes.tokens, sizes.items) == (30, 5)
    real = config.build(11, 10, 10)
    memory = plan(sizes, 1, 1).memory
    assert memory.weights == sum(parameter.nbytes for parameter in real.parameters())
    assert sizes.expert.flops == 2 * 2 * 16 * 32
    found = measure(real, torch.randint(0, 10, (5, 6)), [block.ffn.experts for block in real.blocks])
    assert found.inside.saved + found.outside.saved == pytest.approx(memory.activations, rel=CLOSE)
    assert plan(sizes, 5, 1).memory.weights == memory.weights
    with pytest.raises(ValueError, match="6 processes and ep_size 1 for 4 experts and 5 items"):
        plan(sizes, 6, 1)


def test_networks_that_a_plan_is_not_for_are_refused():
    def mixture(num_experts):
        return MoE(TopK(4, num_experts), ModuleExperts(lambda: torch.nn.Linear(4, 4), num_experts))

    soft = SoftMoE(Soft(4, 2), ModuleExperts(lambda: torch.nn.Linear(4, 4), 2))
    unlike = torch.nn.Sequential(mixture(2), mixture(3))
    for network, found in ((unlike, "num_experts=2.* num_experts=3"), (soft, "got Soft")):
        with pytest.raises(ValueError, match=found):
            measure_sizes(network, lambda count: torch.randn(count, 4), items=8, state=doubled)
    merged = MergedMoE(TopK(4, 2), lambda: torch.nn.Linear(4, 4), 2)
    sizes = measure_sizes(
        torch.nn.Sequential(merged.to("meta")), lambda count: torch.randn(count, 4), items=8, state=doubled
    )
    assert sizes.layers == 0  # nothing is dispatched
