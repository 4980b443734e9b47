from dataclasses import asdict, fields, replace

import pytest
import yaml

from gatewright.data import AugmentConfig, DataConfig
from gatewright.models import ResNetsConfig
from gatewright.recipes import RECIPES
from gatewright.train import OptimConfig, RunConfig, TrackingConfig, load_config, save_config
from gatewright.train.config import DeepSpeedConfig, ParallelConfig

EVERYTHING = RunConfig(
    recipe="everything",
    model=ResNetsConfig(
        num_experts=3,
        top_k=1,
        router="top-k",
        router_options={"jitter": 0.5, "score": "sigmoid", "normalize": False},
        expert_dropout=0.25,
        losses={"load_balance": 0.5, "router_z": 1e-3},
        dispatch="capacity",
        capacity_factor=1.5,
        min_capacity=2,
        priority="total-weight",
        resnet="article",
        emit="logits",
        feature_size=7,
        stem_depth=1,
        gate_size=5,
        experts="grouped",
        backend="torch",
        shared=True,
        residual=True,
    ),
    data=DataConfig(
        name="owner/images",
        path="/some/where",
        image_size=24,
        holdout=0.25,
        batch_size=7,
        eval_batch_size=9,
        cache="/a cache",
        rotate=True,
        augment=AugmentConfig(flip=True, alternate_flip=True, rotate=True, translate=2, crop=0.5),
    ),
    optim=OptimConfig(
        name="muon",
        lr=1e-5,
        adam_lr=3e-7,
        weight_decay=0.5,
        momentum=0.5,
        betas=(0.5, 0.75),
        warmup_epochs=1.5,
        warmup="log",
        schedule="constant",
        clip_norm=1e10,
        accumulation_steps=3,
        ema_decay=0.5,
        label_smoothing=0.25,
    ),
    tracking=TrackingConfig(
        enabled=False, name="mine:open_tracker", uri="http://127.0.0.1:1", experiment="Ünïcode: #1", log_interval=3
    ),
    parallel=ParallelConfig(ep_size=2, shard="fsdp", balance="local", batch_norm="local", timeout=1.5, max_restarts=0),
    processes=2,
    seed=2**40,
    engine="deepspeed",
    deepspeed=DeepSpeedConfig(config="ds.json", trust_checkpoint=True),
    epochs=3,
    precision="float16",
    device="cpu",
    channels_last=False,
    compile=True,
    cuda_graphs=True,
    checkpoint_every=2,
    checkpoint_every_steps=7,
    checkpoint_in_background=True,
    output="a folder/with: yaml, 'in' its name",
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "config.yaml"


def changed(path, change):
    """Write the settings of everything above with a change to them."""
    save_config(EVERYTHING, path)
    settings = yaml.safe_load(path.read_text())
    change(settings)
    path.write_text(yaml.safe_dump(settings))
    return path


def refusal(path):
    with pytest.raises(ValueError, match=r"\w") as caught:
        load_config(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("config", [*(recipe() for recipe in RECIPES.values()), EVERYTHING], ids=lambda c: c.recipe)
def test_what_is_saved_is_loaded(config, path):
    save_config(config, path)
    loaded = load_config(path)
    assert loaded == config
    assert type(loaded.model) is type(config.model)
    assert type(loaded.optim.betas) is tuple


def test_everything_differs_from_the_defaults():
    run = EVERYTHING
    same = []
    for part in (run, run.model, run.data, run.optim, run.tracking, run.parallel, run.deepspeed):
        defaults = {item.name: item.default for item in fields(part)}
        same += [name for name, value in asdict(part).items() if value == defaults[name]]
    # A config is of one task; what is upcycled has modules alone, and DeepSpeed's own layer goes with little else.
    assert same == ["task", "upcycle_epoch", "layer"]


def test_deepspeeds_layer_is_saved_and_loaded(path):
    recipe = RECIPES["cifar10-cnn"]()
    options = {"noisy_gate_policy": None}
    model = replace(recipe.model, layer="deepspeed", router="top-k", router_options=options, upcycle_epoch=0)
    config = replace(recipe, engine="deepspeed", model=model)
    save_config(config, path)
    assert load_config(path) == config


@pytest.mark.parametrize(
    ("place", "key", "nearest"), [((), "epoch", "epochs"), (("data", "augment"), "flipp", "data.augment.flip")]
)
def test_an_unknown_key_is_named_with_the_nearest(path, place, key, nearest):
    def add(settings):
        for name in place:
            settings = settings[name]
        settings[key] = 1

    message = refusal(changed(path, add))
    unknown = ".".join([*place, str(key)])
    assert f"no setting {unknown!r}; did you mean {nearest!r}?" in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 2.7}, "`epochs` should be a valid integer; got 2.7."),
        (
            {"optim": {"lr": "fast", "betas": [0.9]}},
            "`optim.lr` should be a valid number; got 'fast'. `optim.betas` is",
        ),
        ({"model": "CnnConfig"}, "There is no `model.network` None"),
    ],
)
def test_what_does_not_fit_is_said(path, changes, message):
    assert message in refusal(changed(path, lambda settings: settings.update(changes)))


def test_numbers_that_yaml_takes_for_words_are_numbers(path):
    loaded = load_config(changed(path, lambda settings: settings["optim"].update(lr="1e-3", clip_norm=1)))
    assert (loaded.optim.lr, loaded.optim.clip_norm) == (1e-3, 1.0)


@pytest.mark.parametrize("key", ["recipe", "model"])
def test_what_is_missing_is_named(path, key):
    assert f"`{key}` is required, and missing" in refusal(changed(path, lambda settings: settings.pop(key) and None))


@pytest.mark.parametrize("content", [b"\xff\xfe\x00a", b"just words", b"!!python/object:os.system {}"])
def test_a_file_that_is_no_config_is_refused(path, content):
    path.write_bytes(content)
    assert "\n" not in refusal(path)
    assert "is not YAML" in refusal(path) or "it is not a mapping of keys to values" in refusal(path)


def test_the_setting_of_an_earlier_version_has_its_new_name(tmp_path):
    config = RECIPES["cifar10-cnn"]()
    save_config(config, tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text()
    assert "upcycle_epoch: 8" in text
    (tmp_path / "config.yaml").write_text(text.replace("upcycle_epoch", "split_epoch"))
    assert load_config(tmp_path / "config.yaml") == config
