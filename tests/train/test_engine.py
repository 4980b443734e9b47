import copy
import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from gatewright import aux_loss, seed_noise
from gatewright.tasks import task_named
from gatewright.train import OptimConfig
from gatewright.train.device import find_device
from gatewright.train.step import TorchEngine
from tests.train.engines import IMAGES, MIXTURE, SGD, classifier, engine_for, linear, train_for, weights
from tests.train.runs import batches_of, digits_config, text_config


def test_accumulation_equals_one_batch():
    first = linear()
    second = copy.deepcopy(first)
    whole, parts = engine_for(model=first), engine_for(model=second)
    for _ in range(3):
        images, labels = next(batches_of(IMAGES, 48))
        reports = [whole.step([(images, labels)]), parts.step(list(zip(images.chunk(3), labels.chunk(3), strict=True)))]
        assert_close(reports[0].task_loss, reports[1].task_loss)
        assert_close(reports[0].gradient_norm, reports[1].gradient_norm)
    assert_close(weights(first), weights(second), rtol=1e-5, atol=1e-7)
    assert whole.step_count == parts.step_count == 3


def test_a_step_is_the_one_written_out():
    model = linear()
    expected, before = copy.deepcopy(model), weights(model)
    images, labels = next(batches_of(IMAGES, 16))
    optim = replace(SGD, label_smoothing=0.2, warmup_epochs=1)
    report = engine_for(optim=optim, model=model).step([(images, labels)])
    loss = F.cross_entropy(expected(images), labels, label_smoothing=0.2)
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in expected.parameters()]).norm()
    assert_close(report.task_loss, loss.detach())
    assert_close(report.gradient_norm, norm)
    assert (report.aux_loss, report.learning_rate) == (0.0, 0.1 * 0.25)  # the first of 4 steps of warm-up
    for name, parameter in expected.named_parameters():
        assert_close(model.get_parameter(name).detach(), before[name] - 0.025 * parameter.grad)


def test_the_auxiliary_loss_is_added():
    """The gradient of the step is that of task and auxiliary loss, and without the latter it is another one."""
    gates = {}
    for losses in ({"importance": 2.0, "load": 3.0}, {}):
        torch.manual_seed(1)
        model_config = replace(MIXTURE, losses=losses)
        model = classifier(model_config)
        nn.init.normal_(model.network.mixture.router.gate.weight)
        expected, before = copy.deepcopy(model).train(), weights(model)
        images, labels = next(batches_of(IMAGES, 16))
        engine = engine_for(model_config, model=model)
        report = engine.step([(images, labels)])
        seed_noise(expected, engine.config.seed, 0)  # as the first step does
        loss = F.cross_entropy(expected(images), labels)
        auxiliary = aux_loss(expected)
        (loss + auxiliary).backward()
        assert report.aux_loss == pytest.approx(auxiliary.item(), rel=1e-5)
        assert bool(report.aux_loss) is bool(losses)
        after = weights(model)
        for name, parameter in expected.named_parameters():
            assert_close(after[name], before[name] - 0.1 * parameter.grad)
        gates[bool(losses)] = after["network.mixture.router.gate.weight"]
    assert not torch.allclose(gates[True], gates[False])


def test_the_sums_are_those_of_every_micro_batch_since_they_were_taken():
    engine, seen = engine_for(MIXTURE), []
    nn.init.normal_(engine.model.network.mixture.router.gate.weight)
    engine.model.network.mixture.register_forward_hook(lambda layer, args, output: seen.append(layer.routing.sums))
    batches = batches_of(IMAGES, 8)
    for _ in range(2):
        engine.step(list(islice(batches, 3)))
    ((name, sums),) = engine.take_sums().items()
    assert name == "network.mixture"
    assert sums.num_tokens == 2 * 3 * 8
    for key, value in sums.by_name().items():
        assert_close(value, sum(part.by_name()[key] for part in seen), equal_nan=True)
    assert engine.take_sums() == {}


def test_averaged_weights_follow_the_formula_and_are_evaluated():
    engine = engine_for(optim=replace(SGD, ema_decay=0.75))
    batches, expected = batches_of(IMAGES, 16), None
    for batch in islice(batches, 4):
        engine.step([batch])
        now = {k: v.detach().clone() for k, v in engine.model.state_dict().items() if v.is_floating_point()}
        expected = now if expected is None else {k: 0.75 * expected[k] + 0.25 * v for k, v in now.items()}
    evaluated = engine.evaluated.state_dict()
    assert engine.evaluated is not engine.model
    assert (plain := engine_for()).evaluated is plain.model
    assert "network.features.1.running_var" in expected  # buffers are averaged as weights are
    assert_close({name: evaluated[name] for name in expected}, expected)
    assert not torch.equal(evaluated["network.features.0.weight"], engine.model.network.features[0].weight)


class Probe(nn.Module):
    """Notes the dtype that reaches it."""

    def forward(self, x):
        self.seen = x.dtype
        return x


@pytest.mark.parametrize(("precision", "name"), [("float32", "sgd"), ("bfloat16", "adamw"), ("float16", "muon")])
def test_every_precision_and_optimizer_learns(precision, name):
    probe = Probe()
    model = classifier(MIXTURE)
    model = nn.Sequential(model.network.features[:4], probe, model.network.features[4:], model.network.mixture)
    lr = {"adamw": 3e-3, "sgd": 0.1, "muon": 0.03}[name]
    optim = OptimConfig(name=name, lr=lr, adam_lr=3e-3, schedule="constant", clip_norm=5.0)
    engine = engine_for(MIXTURE, optim, model=model, precision=precision)
    before = weights(model)
    losses = train_for(engine, 30)
    assert probe.seen == getattr(torch, precision)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])
    unmoved = [name for name, value in weights(model).items() if torch.equal(value, before[name])]
    assert unmoved == []


class ReadsNothing(TorchDispatchMode):
    """Refuses to tell a tensor's value, for which a GPU would have to finish all that it was asked for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def tiny(recipe, model=None, **changes):
    """An engine of a recipe, and a batch."""
    config = text_config("run", Path("text")) if recipe == "python-lm" else digits_config("run")
    optim = replace(config.optim, clip_norm=1.0, accumulation_steps=2)
    config = replace(config, model=replace(config.model, **model or {}), optim=optim, **changes)
    model = task_named(config.task).build(config.model, {"image_shape": (1, 8, 8), "class_names": "0123456789"})
    engine = TorchEngine(model, config, device=torch.device("cpu"), steps_per_epoch=4)
    text, images = torch.arange(96).view(6, 16), torch.linspace(0, 1, 384).view(6, 1, 8, 8)
    return engine, ((text, text + 1) if recipe == "python-lm" else (images, torch.arange(6)))


@pytest.mark.parametrize(
    "model", [{}, {"num_experts": 1}, {"router": "biased", "router_options": {}}], ids=["mixture", "dense", "biased"]
)
@pytest.mark.parametrize("recipe", ["digits", "python-lm"])
def test_a_step_reads_nothing_from_the_device(recipe, model):
    engine, batch = tiny(recipe, model)
    engine.step([batch])
    with ReadsNothing():
        engine.step([batch, batch])
    with pytest.raises(AssertionError), ReadsNothing():
        engine.check_finite()


@pytest.mark.parametrize("channels_last", [True, False])
def test_the_memory_format_is_that_of_the_config(channels_last):
    engine = engine_for(channels_last=channels_last)
    weight = engine.model.network.features[3].weight
    assert weight.is_contiguous(memory_format=torch.channels_last) is channels_last
    assert weight.is_contiguous() is not channels_last


def test_devices_are_found_or_named():
    assert find_device("cpu") == torch.device("cpu")
    assert find_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("gpu", "", "meta", "cuda:99"):
        with pytest.raises(ValueError, match=f"There is no device '{name}' here. Use `device=auto`, or cpu."):
            find_device(name)


def compiled_and_not():
    """Losses of the same steps of two mixtures in eager mode and compiled, and what is evaluated then."""
    torch.set_num_threads(1)
    torch._inductor.config.compile_threads = 1
    torch._inductor.config.cpp_cache_precompile_headers = False  # which cost more than these few kernels
    for recipe in ("digits", "python-lm"):  # Sizes in which they differ are symbols in the second one's graph.
        losses, outputs = [], []
        for compile_it in (False, True):
            torch.manual_seed(0)
            engine, batch = tiny(recipe, compile=compile_it)
            losses.append([float(engine.step([batch]).task_loss) for _ in range(3)])
            assert isinstance(engine._network, torch._dynamo.OptimizedModule) is compile_it
            outputs.append(engine.evaluated.eval()(batch[0]).detach())
        yield recipe, losses, outputs


def trains_compiled():
    for recipe, (eager, compiled), (expected, outputs) in compiled_and_not():
        assert_close(compiled[0], eager[0], msg=recipe)
        # Later steps carry rounding that Adam made larger.
        assert_close(compiled, eager, rtol=1e-5, atol=1e-5)
        assert_close(outputs, expected, rtol=1e-2, atol=1e-3)
        assert eager[-1] < eager[0]


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="torch's inductor needs a C++ compiler")
def test_compiled_training_is_eager_training(run_unhooked):
    run_unhooked(trains_compiled)
