"""The language model as a task: its figure, its kinds and spans, and the same numbers on several processes."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from gatewright.data import BEGIN, TextSet, load_text
from gatewright.report import write_all
from gatewright.tasks import LanguageModel, generate
from gatewright.tasks.spans import typical_spans
from gatewright.train import evaluate, load_config, load_run, train
from tests.train.runs import logged, text_config, write_text


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    config = text_config(folder / "run", write_text(folder), log_interval=1)
    return config, *train(config, report=write_all)


def naive_bits(model, text):
    """Bits per byte in a plain loop: every byte from those before it in its window and document."""
    content, starts, bits = text.content.tolist(), set(text.starts.tolist()), 0.0
    for first in range(0, len(content), text.context):
        for place in range(first, min(first + text.context, len(content))):
            begin = max([start for start in starts if start <= place] + [first])
            read = [BEGIN if begin in starts else content[begin - 1], *content[begin:place]]
            logits = model(torch.tensor([read]))[0, -1]
            bits -= float(logits.log_softmax(-1)[content[place]]) / math.log(2)
    return bits / len(content)


def test_a_run_is_judged_by_the_bits_of_every_byte_of_the_test_text(trained):
    config, result, output = trained
    run, test = load_run(output), load_text(config.data).test
    small = replace(test, content=test.content[:100], starts=test.starts[test.starts < 100])
    with torch.no_grad():
        found = evaluate(run.task, run.model, small, batch_size=3)
        assert found.bits_per_byte == pytest.approx(naive_bits(run.model, small), rel=1e-4)
        assert evaluate(run.task, run.model, test, batch_size=32).bits_per_byte == pytest.approx(
            result["test_bits_per_byte"], rel=1e-5
        )
    assert result["test_headline"] == ["bits per byte", f"{result['test_bits_per_byte']:.4f}"]
    assert result["test_bits_per_byte"] < 6
    assert load_config(output / "config.yaml") == config
    assert json.loads((output / "result.json").read_text())["data"][0]["digest"] == load_text(config.data).train.digest


def test_what_the_experts_do_is_told_by_kind_of_byte_and_by_spans(trained):
    config, result, output = trained
    test = load_text(config.data).test
    assert result["class_names"] == ["letter", "digit", "punctuation", "white space", "other"]
    kinds = test.kinds_of_inputs(torch.tensor([0]), len(test)).flatten().bincount(minlength=5)
    for layer in result["layers"].values():
        assert layer["tokens_per_class"] == kinds.tolist()
        assert [sum(row) for row in layer["class_by_expert"]] == [2 * count for count in kinds.tolist()]
        assert len(layer["spans"]) == 4
    assert any(spans for layer in result["layers"].values() for spans in layer["spans"])
    write_all(output)
    assert {path.name for path in output.glob("*.png")} >= {"classes-blocks.0.ffn.png", "load-blocks.1.ffn.png"}
    assert "bits per byte" in (output / "report.html").read_text()
    assert (output / "examples" / "test.txt").read_bytes() == test.content[: test.starts[1]].numpy().tobytes()


def test_the_spans_of_an_expert_are_what_goes_to_it_whenever_it_occurs():
    tokens = torch.tensor([[BEGIN, *b"let ab = ab + xa"]])
    chosen = torch.tensor([[True, *(chr(byte) in "ab" for byte in b"let ab = ab + xa")]])
    assert typical_spans(tokens, chosen) == ["ab", "a"]


def test_what_would_make_it_another_model_or_text_is_refused(trained):
    config = trained[0]
    with pytest.raises(ValueError, match=r"data.context was 16 and is 8, but it decides which data there are"):
        train(replace(config, data=replace(config.data, context=8)), resume=True)
    with pytest.raises(ValueError, match=r"model.top_k was 2 and is 4, but an expert's hidden layer"):
        train(replace(config, model=replace(config.model, top_k=4)), resume=True)


def test_a_dense_language_model_becomes_a_mixture_of_its_copies(trained, tmp_path):
    model = {"upcycle_epoch": 1, "experts": "modules", "router_options": {"score_after_top_k": True}}
    result, output = train(text_config(tmp_path / "run", Path(trained[0].data.path), model=model))
    bits = [line["values"]["holdout/bits_per_byte"] for line in logged(output) if "holdout/loss" in line["values"]]
    assert bits[1] < bits[0] < 8
    assert len(result["layers"]) == 2


def test_generation_goes_on_with_a_prompt_and_is_a_function_of_its_seed(trained):
    run = load_run(trained[2])

    def written(prompt, **options):
        return b"".join(generate(run.model, prompt, 12, context=16, **options))

    assert written(b"line 7", seed=1) == written(b"line 7", seed=1) != written(b"line 7", seed=2)
    likeliest = written(b"line 7", temperature=0.0)
    tokens = torch.tensor([[BEGIN, *b"line 7", *likeliest]])[:, :16]
    with torch.no_grad():
        assert run.model(tokens)[0, 6:].argmax(-1)[:9].tolist() == list(likeliest[:9])
    assert len(written(b"")) == 12


def test_the_loss_is_the_mean_over_the_bytes_of_the_batch():
    task, logits = LanguageModel(), torch.randn(3, 5, 256)
    text = TextSet.pack([b"hello", b"world, all"], context=5)
    batch = text.windows(torch.tensor([0, 5, 10]), 5)
    mean = task.loss(logits, batch) / task.count(batch)
    assert_close(mean, F.cross_entropy(logits.flatten(0, 1), torch.tensor(list(b"helloworld, all"))))
