"""DeepSpeed's settings: its JSON as it is, what is added to it, and what is refused and why."""

import re
from dataclasses import replace

import pytest

from gatewright.integrations.deepspeed.settings import deepspeed_settings
from gatewright.recipes import RECIPES
from gatewright.train.config import DeepSpeedConfig, ParallelConfig
from tests.integrations.deepspeed.runs import ADAMW, ARTICLE, PLAIN, config_of, zero


@pytest.mark.parametrize(
    ("changes", "settings", "words"),
    [
        ({"ep_size": 3}, None, "equally many experts: `model.num_experts` (4)"),
        ({}, zero(3), "ZeRO stage 3 cuts every parameter up between all processes"),
        ({"precision": "float16"}, None, "leave out `compile=True` and `precision=float16`"),
        ({"parallel": ParallelConfig(batch_norm="local")}, None, "`parallel.batch_norm=sync`"),
        ({"parallel": ParallelConfig(shard="fsdp")}, None, "DeepSpeed shards by ZeRO"),
        ({}, {"train_batch_size": 16}, "train_batch_size 16; with `data.batch_size=8`"),
        ({"optim": ADAMW}, {"gradient_clipping": 1.0}, "leave one of them out"),
        ({"precision": "bfloat16"}, {"bf16": {"enabled": True}}, "say `precision=float32`"),
        ({"optim": replace(PLAIN, ema_decay=0.9)}, {"fp16": {"enabled": True}}, "leave `optim.ema_decay` out"),
        (
            {},
            {"zero_optimization": {"stage": 1, "reduce_scatter": False}},
            "With ZeRO 1 DeepSpeed trains experts by reduce_scatter alone",
        ),
        ({}, {"fp16": True}, 'has fp16 True; it is an object, such as {"enabled": true}'),
    ],
)
def test_what_deepspeed_cannot_train_is_refused(tmp_path, changes, settings, words):
    options = {"ep_size": 2, "optim": PLAIN, "batch_size": 8} | changes
    data = replace(RECIPES["digits"]().data, batch_size=options.pop("batch_size"))
    config = replace(config_of(options.pop("ep_size"), settings=settings, folder=tmp_path), data=data, **options)
    with pytest.raises(ValueError, match=re.escape(words)):
        deepspeed_settings(config, 2, on_cpu=False)


@pytest.mark.parametrize(("text", "words"), [(None, "cannot be read"), ("{", "is not JSON"), ("[]", "one JSON object")])
def test_settings_that_cannot_be_read(tmp_path, text, words):
    path = tmp_path / "settings.json"
    if text is not None:
        path.write_text(text)
    config = replace(config_of(), deepspeed=DeepSpeedConfig(config=str(path)))
    with pytest.raises(ValueError, match=words):
        deepspeed_settings(config, 2, on_cpu=True)


def test_the_json_is_handed_over_as_it_is_but_for_what_a_processor_does_not_have(tmp_path):
    config = config_of(2, PLAIN, ARTICLE, tmp_path, trust=True)
    settings, said = deepspeed_settings(config, 2, on_cpu=False)
    assert said == []
    assert {name: settings[name] for name in ARTICLE} == ARTICLE
    settings, said = deepspeed_settings(config, 2, on_cpu=True)
    assert ["fp16 is off" in said[0], "torch's" in said[1], len(said)] == [True, True, 2]
    assert settings["fp16"] == {**ARTICLE["fp16"], "enabled": False}
    assert settings["optimizer"]["params"] == {**ARTICLE["optimizer"]["params"], "torch_adam": True}
    assert settings["scheduler"] == ARTICLE["scheduler"]


def test_the_runs_clipping_is_deepspeeds_where_gradients_are_not_whole(tmp_path):
    settings, _ = deepspeed_settings(config_of(2, ADAMW, zero(1), tmp_path), 2, on_cpu=True)
    assert settings["gradient_clipping"] == ADAMW.clip_norm
    settings, _ = deepspeed_settings(config_of(2, ADAMW, zero(0), tmp_path), 2, on_cpu=True)
    assert "gradient_clipping" not in settings
