"""The shapes of the demo checkpoint's parts, in the schemas of the official repository's config files."""

TEMPLATE = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
SIGMAS = (1.0, 0.9545, 0.9, 0.8333, 0.75, 0.6429, 0.5, 0.3, 0.0)
PAD_MULTIPLE = 32

# int8 is only how the weights travel: loaders multiply them out, because the host's int8 arithmetic rounds
# activations too.
QUANTISATION = {"quant_method": "int8_tensorwise", "dequantize": True}

TRANSFORMER = {
    "_class_name": "ZImageTransformer2DModel",
    "all_patch_size": [2],
    "all_f_patch_size": [1],
    "in_channels": 16,
    "dim": 256,
    "n_layers": 8,
    "n_refiner_layers": 2,
    "n_heads": 2,
    "n_kv_heads": 2,
    "ffn_hidden_dim": 512,
    "norm_eps": 1e-5,
    "qk_norm": True,
    "cap_feat_dim": 256,
    "rope_theta": 256.0,
    "t_scale": 1000.0,
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
    "sample_size": 32,
    # For previews: colour in -1..1 from one latent pixel, by least squares over rendered scenes (it explains 92 %).
    "latent_rgb_factors": [
        [-0.029, -0.109, -0.245],
        [0.151, -0.037, 0.002],
        [0.047, -0.173, 0.052],
        [0.04, -0.064, 0.039],
        [-0.094, -0.118, -0.26],
        [0.035, -0.042, 0.044],
        [0.019, -0.04, 0.027],
        [0.008, -0.124, 0.067],
        [-0.148, -0.205, -0.003],
        [-0.042, -0.04, -0.028],
        [0.031, -0.07, 0.028],
        [-0.152, -0.055, 0.029],
        [0.037, -0.037, 0.03],
        [0.023, 0.126, 0.044],
        [0.035, -0.095, 0.086],
        [0.138, 0.012, -0.011],
    ],
    "latent_rgb_factors_bias": [0.273, 0.223, 0.241],
    "quantization_config": QUANTISATION,
}

# The condition is the state before the last layer, so four of the five layers do the work.
TEXT_ENCODER = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 5,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "attention_bias": False,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "quantization_config": QUANTISATION,
}

# Group norm has 32 groups: with one channel a group (width 32) the decoder loses flat colours.
AUTOENCODER = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 16,
    "block_out_channels": [64, 64, 64, 64],
    "layers_per_block": 1,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "norm_num_groups": 32,
    "mid_block_add_attention": True,
    "sample_size": 256,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "force_upcast": True,
}

SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": False,
}

MODEL_INDEX = {
    "_class_name": "ZImagePipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen3Model"],
    "tokenizer": ["transformers", "Qwen2Tokenizer"],
    "transformer": ["diffusers", "ZImageTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}

TOKENIZER = {
    "tokenizer_class": "Qwen2Tokenizer",
    "pad_token": "<|endoftext|>",
    "eos_token": "<|im_end|>",
    "add_prefix_space": False,
    "model_max_length": 1024,
}
