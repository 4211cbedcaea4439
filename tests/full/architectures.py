"""A small model, with random weights, of any architecture that transformers has as a causal language model."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

KINDS = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
MOST = 30_000_000
"""Parameters beyond which a model is not small."""
_SIZES: dict[int, str] = {
    96: "vocab_size decoder_vocab_size",
    256: "max_position_embeddings n_positions max_seq_len n_ctx",
    64: "hidden_size d_model n_embd dim lru_width emb_dim embedding_dim embedding_size input_embedding_size "
    "word_embed_proj_dim output_embedding_size attention_hidden_size dim_model_base backbone_hidden_size",
    4: "num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers num_attention_heads n_head "
    "n_heads num_heads decoder_attention_heads attention_heads num_decoder_attention_heads num_experts "
    "n_routed_experts num_local_experts moe_num_experts linear_num_value_heads num_experts_per_layer zero_expert_num "
    "index_n_heads swa_num_attention_heads linear_num_heads num_layers_per_stack num_blocks mamba_num_heads "
    "index_topk_blocks o_groups",
    2: "num_key_value_heads num_kv_heads swa_num_key_value_heads num_experts_per_tok num_experts_per_token moe_topk "
    "moe_k linear_num_key_heads n_group topk_group encoder_layers num_encoder_layers num_query_groups",
    16: "head_dim v_head_dim qk_nope_head_dim linear_key_head_dim linear_value_head_dim index_head_dim d_head dim_head "
    "kv_channels attention_head_dim swa_head_dim linear_head_dim kv_lora_rank q_lora_rank o_lora_rank "
    "hidden_size_per_layer_input laurel_rank mamba_d_state state_size ssm_state_size rotary_dim "
    "moe_shared_expert_intermediate_size router_hidden_size ple_embed_dim hc_lowrank query_pre_attn_scalar "
    "global_head_dim",
    8: "qk_rope_head_dim index_topk index_block_size keep_window_size attention_chunk_size",
    24: "qk_head_dim",
    128: "intermediate_size d_inner dff dim_ff ffn_dim decoder_ffn_dim encoder_ffn_dim ffn_hidden_size "
    "intermediate_size_mlp moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size "
    "shared_intermediate_size dense_intermediate_size",
    1: "first_k_dense_replace num_dense_layers moe_num_shared_experts n_shared_experts mamba_n_groups n_groups",
    7: "sliding_window sliding_window_size window_size attention_window_size local_attention",
    1000: "ngram_vocab_size_base",
}
_SIZE = {key: size for size, keys in _SIZES.items() for key in keys.split()}
# What is not told by names alone: sizes that have to fit one another, and what else makes a kind large.
_OF_ITS_OWN: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "intermediate_size": 128},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 16},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"] * 2, "index_topk_blocks": 2},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "deepseek_v2": {"topk_method": "greedy", "num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
    **{
        key: {"num_kv_shared_layers": 0}
        for key in ("gemma3n_text", "gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text")
    },
    "cohere_compass_text": {
        "rope_parameters": {
            key: {"rope_type": "default", "rope_theta": 10000.0} for key in ("sliding_attention", "full_attention")
        }
    },
    "kimi_linear": {"num_experts": 4, "n_group": 1, "topk_group": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "reformer": {"axial_pos_embds": False, "is_decoder": True},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 8,
        "attn_layer_period": 3,
        "attn_layer_offset": 2,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
    "zamba2": {
        "layers_block_type": ["mamba", "mamba", "hybrid", "mamba", "hybrid", "mamba"],
        "num_hidden_layers": 6,
        "attention_head_dim": 32,
        "attention_hidden_size": 128,
    },
    "zaya": {"num_experts_per_tok": 1},
}


def small(kind: str, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """The model of architecture `kind`, in fp32 and in eval mode; `settings` are the (language part's) configuration's.

    Weights are larger than at the start of a training, so that attention is not the same everywhere. Raises what
    transformers raises.
    """
    config = CONFIG_MAPPING[kind]
    torch.manual_seed(seed)
    chosen = _shrunk(config(), kind) | settings
    part = next((key for key in ("text_config",) if key in config.sub_configs), None)
    made: PreTrainedConfig = config(**{part: chosen}) if part else config(**chosen)
    made.is_decoder = True
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(made).parameters())
    if size > MOST:
        raise ValueError(f"{size:,} parameters are not small")
    model = AutoModelForCausalLM.from_config(made).float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.7 if "embed" in name or "wte" in name else 1.5 * weight[0].numel() ** -0.5)
            elif not any(part in name for part in ("norm", "A_log", "ln_")):
                weight.add_(torch.randn_like(weight) * 0.1)
    return model


def _shrunk(config: PreTrainedConfig, kind: str) -> dict[str, Any]:
    """Small sizes for what the (language part of the) configuration has as a number."""
    text = config.get_text_config()
    given = text.to_dict()
    small = {
        key: size
        for key, size in _SIZE.items()
        if isinstance(given.get(key), int | float) and not isinstance(given[key], bool)
    }
    tokens = {
        key: 1 for key, value in given.items() if key.endswith("_token_id") and isinstance(value, int) and value >= 96
    }
    lists = {
        key: None for key in given if key in ("layer_types", "layers_block_type", "mlp_layer_types", "block_types_list")
    }
    if "qk_rope_head_dim" in small and "head_dim" in small:
        small["head_dim"] = small["qk_rope_head_dim"]
    if "kv_lora_rank" in small or kind == "minicpm3":
        small["num_key_value_heads"] = small["num_attention_heads"]
    return small | tokens | lists | _OF_ITS_OWN.get(kind, {})
