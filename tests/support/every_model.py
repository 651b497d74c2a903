"""A tiny random model of every type that transformers can make a causal LM of, as far as one can be built."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
LARGEST = 3_000_000  # parameters


def _same(value, *names):
    return dict.fromkeys(names, value)


# By every name that a configuration has for it.
SIZES = {
    "vocab_size": 258,
    **_same(32, "hidden_size", "n_embd", "d_model", "embedding_size", "word_embed_proj_dim"),
    **_same(48, "intermediate_size", "n_inner", "ffn_dim", "d_ff", "decoder_ffn_dim", "ffn_hidden_size"),
    **_same(2, "num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"),
    **_same(4, "num_attention_heads", "n_head", "n_heads", "decoder_attention_heads", "encoder_attention_heads"),
    **_same(2, "num_key_value_heads", "num_attention_groups", "num_experts_per_tok", "linear_num_key_heads"),
    **_same(256, "max_position_embeddings", "n_positions"),
    **_same(4, "num_experts", "num_local_experts", "n_routed_experts", "linear_num_value_heads"),
    **_same(16, "moe_intermediate_size", "shared_expert_intermediate_size", "sliding_window"),
    **_same(8, "head_dim", "d_kv", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim"),
    **_same(8, "v_head_dim", "state_size", "mamba_d_state", "mamba_n_heads", "mamba_d_head", "num_heads"),
    **_same(8, "linear_key_head_dim", "linear_value_head_dim"),
    **_same(1, "n_group", "topk_group", "n_shared_experts", "first_k_dense_replace", "eos_token_id", "bos_token_id"),
    **_same(0, "pad_token_id", "moe_layer_start_index"),
    "initializer_range": 0.2,
}
_PER_LAYER = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "vocab_size_per_layer_input": 258,
    "hidden_size_per_layer_input": 8,
}
_SMALL_EYES = {
    "vision_config": {
        **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4},
        **{"image_size": 28, "patch_size": 14},
    }
}
# Where these sizes do not go together, or there are others.
OWN = {
    "codegen": {"rotary_dim": 4, "head_dim": None},
    "gptj": {"rotary_dim": 4, "head_dim": None},
    "gpt_neo": {"num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 16},
    "xmod": {"is_decoder": True, "languages": ["en_XX"], "default_language": "en_XX"},
    "jamba": {"num_hidden_layers": 8},
    "qwen3_next": {"num_hidden_layers": 4},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "dbrx": {
        "ffn_config": {"ffn_hidden_size": 48},
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
    },
    "xlm": {"emb_dim": 32},
    "zaya": {"num_experts_per_tok": 1},
    "falcon_h1": {"mamba_d_ssm": 64},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "gemma3": _SMALL_EYES,
    "gemma3n_text": {
        **_PER_LAYER,
        "num_kv_shared_layers": 2,
        "laurel_rank": 4,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    **_same({**_PER_LAYER, "global_head_dim": 16, **_SMALL_EYES}, "gemma4"),
    **_same({**_PER_LAYER, "global_head_dim": 16}, "gemma4_text", "gemma4_unified_text"),
    "longcat_flash": {
        "num_key_value_heads": 4,
        "expert_ffn_hidden_size": 16,
        "zero_expert_num": 2,
        "moe_topk": 2,
    },
    "reformer": {
        **{"is_decoder": True, "attention_head_size": 8, "attn_layers": ["local", "local"], "feed_forward_size": 48},
        **{"axial_pos_shape": [16, 16], "axial_pos_embds_dim": [16, 16], "local_attn_chunk_length": 16},
    },
    "roc_bert": {
        **{"is_decoder": True, "concat_input": False, "shape_vocab_size": 64, "shape_embed_dim": 16},
        **{"pronunciation_vocab_size": 64, "pronunciation_embed_dim": 16},
    },
    # latent attention has as many key as query heads
    **_same({"num_key_value_heads": 4}, "axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32"),
    **_same({"num_key_value_heads": 4}, "dots3_note_text", "glm4_moe_lite", "glm_moe_dsa", "minicpm3", "youtu"),
    **_same({"is_decoder": True}, "bert", "roberta", "xlm-roberta", "camembert", "data2vec-text", "electra", "ernie"),
    **_same({"is_decoder": True}, "roberta-prelayernorm", "xlm-roberta-xl", "rembert", "roformer"),
    **_same({"is_decoder": True}, "bert-generation", "megatron-bert", "big_bird"),
}


class NotTinyError(ValueError):
    """No small model of this type can be built; the reason."""


def tiny(model_type: str, **settings):
    """A random model of this type in evaluation mode, always the same; `NotTinyError` where none can be built."""
    try:
        plain = AutoConfig.for_model(model_type)
        text = plain.get_text_config()
        wanted = {name: value for name, value in SIZES.items() if name in text.to_dict()}
        wanted |= {**OWN.get(model_type, {}), **settings}
        apart = {name: wanted.pop(name) for name in ("vision_config",) if name in wanted}
        wanted = {name: value for name, value in wanted.items() if value is not None}
        config = AutoConfig.for_model(model_type, **apart, **(wanted if text is plain else {"text_config": wanted}))
        with torch.device("meta"):
            size = AutoModelForCausalLM.from_config(config).num_parameters()
        if size > LARGEST:
            raise NotTinyError(f"{size / 1e6:.0f} million parameters")
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()
    except NotTinyError:
        raise
    except Exception as error:
        raise NotTinyError(f"{type(error).__name__}: {' '.join(str(error).split())[:120]}") from None
