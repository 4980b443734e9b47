"""Small models of transformers with random weights, made from their configs."""

import pytest
import torch

transformers = pytest.importorskip(
    "transformers", "5.20", "transformers is missing: pip install 'gatewright[transformers]'"
)

TOKENS = torch.randint(2, 32, (3, 7), generator=torch.Generator().manual_seed(0))
SIZES = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_hidden_layers": 2,
    "num_experts_per_tok": 2,
    "vocab_size": 32,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


def mixtral(**options):
    return _model(transformers.MixtralConfig(**SIZES, intermediate_size=24, num_local_experts=4), **options)


def qwen3_moe(**options):
    sizes = {"intermediate_size": 24, "moe_intermediate_size": 20, "num_experts": 6, "norm_topk_prob": True}
    return _model(transformers.Qwen3MoeConfig(**SIZES, **sizes), **options)


def gpt_oss(**options):
    return _model(transformers.GptOssConfig(**SIZES, intermediate_size=24, num_local_experts=4), **options)


MODELS = {"mixtral": mixtral, "qwen3_moe": qwen3_moe, "gpt_oss": gpt_oss}


def _model(config, **options):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, **options)
    for parameter in model.parameters():
        if parameter.dim() != 1 or (parameter == 0).all():  # Norms stay as they are; biases begin at zero.
            torch.nn.init.normal_(parameter, std=0.3)
    return model
