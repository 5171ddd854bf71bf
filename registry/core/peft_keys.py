"""What PEFT knows, as plain data: the configuration keys of each tuner type and the names under which tuners keep
their tensors. tests/compat/test_names_against_peft.py holds every table against the installed PEFT, so after an
upgrade its message says what to add here; what an older PEFT had is only ever added to, never taken away."""

from __future__ import annotations

KNOWN_PEFT = "0.21"
"""The newest PEFT whose keys and names stand here."""


def _keys(names: str) -> frozenset[str]:
    return frozenset(names.split())


COMMON_KEYS = _keys("auto_mapping base_model_name_or_path inference_mode peft_type peft_version revision task_type")
"""In the configuration of every tuner."""

_PROMPT = _keys(
    "modules_to_save num_attention_heads num_layers num_transformer_submodules num_virtual_tokens token_dim"
)
_LAYERS = _keys("init_weights layers_pattern layers_to_transform modules_to_save target_modules")
_LORA = _keys(
    "alora_invocation_tokens alpha_pattern arrow_config bias corda_config ensure_weight_tying eva_config "
    "exclude_modules fan_in_fan_out init_lora_weights kasa_config layer_replication layers_pattern "
    "layers_to_transform loftq_config lora_alpha lora_bias lora_dropout lora_ga_config megatron_config "
    "megatron_core modules_to_save monteclora_config qalora_group_size r rank_pattern runtime_config "
    "target_modules target_parameters trainable_token_indices use_bdlora use_dora use_qalora use_rslora "
    "velora_config"
)

CONFIG_KEYS: dict[str, frozenset[str]] = {
    "ADALORA": _LORA | _keys("beta1 beta2 deltaT init_r orth_reg_weight target_r tfinal tinit total_step"),
    "ADAMSS": _LAYERS
    | _keys(
        "asa_importance_beta asa_schedule_exponent asa_target_subspaces asa_uncertainty_beta final_warmup "
        "init_warmup mask_interval num_subspaces r random_seed subspace_rank svd_threshold use_asa use_dynamic_rank"
    ),
    "ADAPTION_PROMPT": _keys("adapter_layers adapter_len target_modules"),
    "BEFT": _keys("init_weights modules_to_save target_modules"),
    "BOFT": _LAYERS
    | _keys("bias boft_block_num boft_block_size boft_dropout boft_n_butterfly_factor exclude_modules fan_in_fan_out"),
    "C3A": _LAYERS | _keys("bias block_size block_size_pattern"),
    "CARTRIDGE": _PROMPT | _keys("num_frozen_tokens"),
    "CPT": _PROMPT
    | _keys(
        "cpt_mask cpt_token_ids cpt_tokens_type_mask opt_loss_decay_factor opt_projection_epsilon "
        "opt_projection_format_epsilon opt_weighted_loss_type tokenizer_name_or_path"
    ),
    "DEFT": _LAYERS
    | _keys("alpha bias decomposition_method deft_dropout exclude_modules fan_in_fan_out init_scale para r"),
    "DELORA": _LAYERS | _keys("bias delora_lambda exclude_modules lambda_pattern module_dropout r rank_pattern"),
    "FOURIERFT": _LAYERS
    | _keys("bias exclude_modules fan_in_fan_out n_frequency n_frequency_pattern random_loc_seed scaling"),
    "FROD": _LAYERS
    | _keys(
        "bias fan_in_fan_out frod_dropout progressbar projection_prng_key regularization_alpha "
        "runtime_offload_base_weight save_projection sparse_rate"
    ),
    "GLORA": _keys("bias config_A_B config_C config_D_E init_weights modules_to_save r target_modules"),
    "GRALORA": _LAYERS | _keys("alpha bias fan_in_fan_out gralora_dropout gralora_k hybrid_r r"),
    "HIRA": _LAYERS | _keys("exclude_modules fan_in_fan_out hira_dropout r rank_pattern"),
    "HRA": _LAYERS | _keys("apply_GS bias exclude_modules r"),
    "IA3": _keys("exclude_modules fan_in_fan_out feedforward_modules init_ia3_weights modules_to_save target_modules"),
    "LILY": _LAYERS | _keys("exclude_modules num_B r scaling stride_A"),
    "LN_TUNING": _keys("exclude_modules modules_to_save target_modules"),
    "LOHA": _LAYERS
    | _keys("alpha alpha_pattern exclude_modules module_dropout r rank_dropout rank_pattern use_effective_conv2d"),
    "LOKR": _LAYERS
    | _keys(
        "alpha alpha_pattern decompose_both decompose_factor exclude_modules module_dropout r rank_dropout "
        "rank_dropout_scale rank_pattern use_effective_conv2d"
    ),
    "LORA": _LORA,
    "MISS": _LAYERS | _keys("bias exclude_modules mini_r miss_dropout r"),
    "MULTITASK_PROMPT_TUNING": _PROMPT
    | _keys(
        "num_ranks num_tasks prompt_tuning_init prompt_tuning_init_state_dict_path prompt_tuning_init_task "
        "prompt_tuning_init_text tokenizer_kwargs tokenizer_name_or_path"
    ),
    "OFT": _LAYERS
    | _keys(
        "bias block_share coft eps exclude_modules fan_in_fan_out module_dropout num_cayley_neumann_terms "
        "oft_block_size r use_cayley_neumann"
    ),
    "OSF": _keys("effective_rank init_weights modules_to_save rank_pattern target_modules target_svd_config"),
    "PEANUT": _LAYERS | _keys("act_fn depth exclude_modules r scaling"),
    "POLY": _keys("exclude_modules init_weights modules_to_save n_skills n_splits n_tasks poly_type r target_modules"),
    "PREFIX_TUNING": _PROMPT | _keys("encoder_hidden_size init_weights prefix_projection"),
    "PROMPT_TUNING": _PROMPT
    | _keys("prompt_tuning_init prompt_tuning_init_text tokenizer_kwargs tokenizer_name_or_path"),
    "PSOFT": _LAYERS
    | _keys(
        "ab_svd_init cayley_neumann_eps exclude_modules fan_in_fan_out num_cayley_neumann_terms psoft_alpha "
        "psoft_dropout psoft_mag_a psoft_mag_b psoft_orth psoft_svd psoft_svd_lowrank_niter r random_seed "
        "use_cayley_neumann"
    ),
    "PVERA": _LAYERS
    | _keys(
        "bias d_initial fan_in_fan_out generator_seed projection_prng_key pvera_dropout r sample_at_inference "
        "save_projection"
    ),
    "P_TUNING": _PROMPT
    | _keys("encoder_dropout encoder_hidden_size encoder_num_layers encoder_reparameterization_type"),
    "RANDLORA": _LAYERS
    | _keys(
        "bias fan_in_fan_out projection_prng_key r randlora_alpha randlora_dropout save_projection sparse very_sparse"
    ),
    "ROAD": _keys("group_size init_weights modules_to_save target_modules variant"),
    "SHADOW": _LAYERS
    | _keys(
        "auxiliary_loss_weight exclude_modules r shadow_alpha shadow_dropout shadow_hidden_size "
        "shadow_intermediate_size shadow_model shadow_num_attention_heads shadow_num_hidden_layers share_embeddings "
        "update_hidden_size"
    ),
    "SHIRA": _keys("fan_in_fan_out init_weights mask_type modules_to_save r random_seed target_modules"),
    "SUPERTUNING": _keys(
        "init_weights lora_alpha lora_dropout modules_to_save r save_precomputed_indices select_top sparsity "
        "target_modules"
    ),
    "TINYLORA": _LAYERS
    | _keys("bias fan_in_fan_out init_v_bound projection_seed r save_projection tinylora_dropout u weight_tying"),
    "TRAINABLE_TOKENS": _keys("init_weights target_modules token_indices"),
    "UNILORA": _LAYERS
    | _keys("bias fan_in_fan_out init_theta_d_bound proj_seed r save_indices theta_d_length unilora_dropout"),
    "VBLORA": _keys(
        "bias exclude_modules fan_in_fan_out init_logits_std init_vector_bank_bound layers_pattern "
        "layers_to_transform modules_to_save num_vectors r save_only_topk_weights target_modules topk "
        "vblora_dropout vector_length"
    ),
    "VERA": _LAYERS | _keys("bias d_initial fan_in_fan_out projection_prng_key r save_projection vera_dropout"),
    "WAVEFT": _LAYERS
    | _keys(
        "bias exclude_modules fan_in_fan_out n_frequency n_frequency_pattern proportional_parameters "
        "random_loc_seed scaling use_idwt wavelet_family"
    ),
    "XLORA": _keys(
        "adapters enable_softmax enable_softmax_topk global_scaling_weight hidden_size layerwise_scalings "
        "scaling_pass_value softmax_temperature top_k_lora use_trainable_adapters xlora_depth xlora_dropout_p "
        "xlora_size"
    ),
}
"""peft_type -> the keys that it has besides `COMMON_KEYS`."""

RETIRED_TYPES: dict[str, str] = {"BONE": "MISS"}
"""Types that older PEFT had and `KNOWN_PEFT` has not (Bone went with 0.19) -> their successor."""

TENSORS = _keys(
    "adamss_newB beft_bias boft_R boft_s c3a_kernel deft_P deft_R delora_A delora_B delora_lambda delora_w_norm "
    "fourierft_spectrum frod_lambda_l frod_lambda_s_values gralora_A gralora_B "
    "hada_t1 hada_t2 hada_w1_a hada_w1_b hada_w2_a hada_w2_b hira_A hira_B hira_embedding_A hira_embedding_B hra_u "
    "ia3_l lokr_t2 lokr_w1 lokr_w1_a lokr_w1_b lokr_w2 lokr_w2_a lokr_w2_b lora_E lora_diag lora_embedding_A "
    "lora_embedding_B lora_velora_embed miss_block poly_lora_A poly_lora_B pvera_A pvera_B pvera_lambda_b "
    "pvera_lambda_d randlora_A randlora_B randlora_gamma randlora_lambda ranknum road_alpha road_theta shira_indices "
    "shira_weight supertuning_indices supertuning_values tinylora_A tinylora_B tinylora_P trainable_tokens_delta "
    "trainable_tokens_original unilora_indices_A unilora_indices_B unilora_scales_A unilora_scales_B unilora_theta_d "
    "vblora_logits_A vblora_logits_B vblora_vector_bank vera_A vera_B vera_lambda_b vera_lambda_d waveft_spectrum"
)
"""Hold one tensor an adapter: `NAME` in a file, `NAME.<adapter>` in a live model."""

MODULES = _keys(
    "glora_A glora_B glora_C glora_D glora_E gralora_A_general gralora_B_general lily_A lily_B lily_router "
    "ln_tuning_layers lora_arrow lora_magnitude_vector lora_monteclora_sampler oft_R oft_embedding_R osf_svd_params "
    "peanut_A peanut_B poly_router psoft_R supertuning_lora_A supertuning_lora_B"
)
"""Hold one module an adapter: `NAME.weight` in a file, `NAME.<adapter>.weight` in a live model."""

TENSORS_OR_MODULES = _keys("lora_A lora_B")
"""Hold modules in LoRA and tensors in AdaLoRA."""

LISTS = _keys("adamss_A adamss_B peanut_decoders peanut_encoders tinylora_v")
"""Hold one list an adapter: `NAME.0` in a file, `NAME.<adapter>.0` in a live model."""

BY_MODULE = _keys("frod_V frod_s_indices frod_s_size")
"""Hold one tensor a module and adapter: `NAME.<module>` in a file, `NAME.<module>.<adapter>` in a live model."""

RENAMED = _keys(
    "shadow_backbone shadow_down shadow_head shadow_projection shadow_up shadow_update_gate shadow_update_transform"
)
"""Hold whole models, in a file always under the adapter name `default`."""

ONE_ADAPTER = _keys(
    "adaption_gate adaption_prompt internal_xlora_classifier prefix_task_cols prefix_task_rows prompt_embeddings "
    "vblora_logits_A_topk_indices vblora_logits_A_topk_weights vblora_logits_B_topk_indices "
    "vblora_logits_B_topk_weights"
)
"""Are never followed by an adapter name."""

CONTAINERS = TENSORS | MODULES | TENSORS_OR_MODULES | LISTS | BY_MODULE | RENAMED | ONE_ADAPTER
"""Every name of a tuner's own parameter or buffer, as one segment of a state-dict name. Whole names, not prefixes:
`road_encoder` and `lora_model` are names of ordinary modules."""

PROMPT_ENCODER_PARTS = _keys(
    "delta_embedding embedding frozen_embedding lstm_head mlp_head prefix_task_cols prefix_task_rows "
    "trainable_embedding transform"
)
"""What a live prompt encoder holds, as `prompt_encoder.<adapter>.PART`."""
