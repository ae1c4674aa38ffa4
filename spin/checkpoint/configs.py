"""Facts about published checkpoints that the checkpoints do not state themselves."""

# ---- Single files --------------------------------------------------------------------------------
# A file in the original layout holds no config. SD_1 and SD_2 hold the config.json contents of the
# same models' diffusers folders, one entry per part.

# Stable Diffusion 1.1 to 1.5
SD_1 = {
    "unet": {
        "sample_size": 64,  # latents of 512 px
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": [320, 640, 1280, 1280],
        "layers_per_block": 2,
        "down_block_types": [
            "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D",
            "DownBlock2D",
        ],
        "cross_attention_dim": 768,  # the text tower's hidden_size
        "attention_head_dim": 8,  # means 8 heads, see unet.heads_per_block
        "up_block_types": [
            "UpBlock2D",
            "CrossAttnUpBlock2D",
            "CrossAttnUpBlock2D",
            "CrossAttnUpBlock2D",
        ],
        "norm_num_groups": 32,
        "act_fn": "silu",
    },
    "vae": {
        "sample_size": 512,  # px
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": [
            "DownEncoderBlock2D",
            "DownEncoderBlock2D",
            "DownEncoderBlock2D",
            "DownEncoderBlock2D",
        ],
        "up_block_types": [
            "UpDecoderBlock2D",
            "UpDecoderBlock2D",
            "UpDecoderBlock2D",
            "UpDecoderBlock2D",
        ],
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "act_fn": "silu",
    },
    # OpenAI's CLIP ViT-L/14
    "text_encoder": {
        "vocab_size": 49408,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu",
    },
    "scheduler": {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": 1000,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "prediction_type": "epsilon",
    },
}

# Stable Diffusion 2.0 and 2.1
SD_2 = {
    "unet": {
        "sample_size": 96,  # latents of 768 px
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": [320, 640, 1280, 1280],
        "layers_per_block": 2,
        "down_block_types": [
            "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D",
            "DownBlock2D",
        ],
        "cross_attention_dim": 1024,  # the text tower's hidden_size
        "attention_head_dim": [5, 10, 20, 20],  # heads of each block
        "up_block_types": [
            "UpBlock2D",
            "CrossAttnUpBlock2D",
            "CrossAttnUpBlock2D",
            "CrossAttnUpBlock2D",
        ],
        "norm_num_groups": 32,
        "act_fn": "silu",
        "use_linear_projection": True,
    },
    "vae": {
        "sample_size": 768,  # px
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": [
            "DownEncoderBlock2D",
            "DownEncoderBlock2D",
            "DownEncoderBlock2D",
            "DownEncoderBlock2D",
        ],
        "up_block_types": [
            "UpDecoderBlock2D",
            "UpDecoderBlock2D",
            "UpDecoderBlock2D",
            "UpDecoderBlock2D",
        ],
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "act_fn": "silu",
    },
    # OpenCLIP's ViT-H/14, without its 24th layer, which SD-2.x does not use
    "text_encoder": {
        "vocab_size": 49408,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 23,
        "num_attention_heads": 16,
        "max_position_embeddings": 77,
        "hidden_act": "gelu",
    },
    "scheduler": {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": 1000,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        # v at 768 px, the noise at 512 px: the file must say which
        "prediction_type": None,
    },
}

# Where the metadata of a .safetensors file may say what its UNet predicts, and in which words.
PREDICTION_METADATA = {
    "modelspec.prediction_type": {  # https://github.com/Stability-AI/ModelSpec
        "epsilon": "epsilon",
        "eps": "epsilon",
        "v": "v_prediction",
        "v_prediction": "v_prediction",
    },
    "modelspec.predict_key": {"epsilon": "epsilon", "v": "v_prediction"},  # ComfyUI's
    "modelspec.architecture": {
        "stable-diffusion-v2-512": "epsilon",
        "stable-diffusion-v2-768-v": "v_prediction",
    },
    "ss_v_parameterization": {"False": "epsilon", "True": "v_prediction"},  # kohya's
}
# In these keys, any other word is refused; in the others, it is ignored.
PREDICTION_KEYS = ("modelspec.prediction_type", "modelspec.predict_key")

# names of empty tensors, which ComfyUI reads as statements about a file's model
V_MARKER = "v_pred"  # its UNet predicts v
ZERO_SNR_MARKER = "ztsnr"  # its schedule ends at pure noise (a terminal SNR of zero)

# What a .yaml beside a file (MODEL.yaml and MODEL.ckpt) says of a UNet's prediction, under
# "parameterization" in the original layout, or by the class of its scaling in a later one.
PREDICTION_YAML = {
    "eps": "epsilon",
    "v": "v_prediction",
    "EpsScaling": "epsilon",
    "VScaling": "v_prediction",
}
# keys of such a .yaml -> the values that are assumed of every file
YAML_BUILT_IN = {
    "beta_schedule": "linear",  # of sqrt(beta): "scaled_linear" in diffusers
    "linear_start": 0.00085,  # beta_start
    "linear_end": 0.012,  # beta_end
    "timesteps": 1000,
    "scale_factor": 0.18215,  # the VAE's scaling_factor
}

# substrings of tensor names -> what a file with such names really is
FOREIGN = {
    "conditioner.embedders.": "SDXL or SD-Turbo",
    "joint_blocks.": "SD-3",
    "double_blocks.": "FLUX",
    "lora_": "LoRA weights: merge them into a model first",  # kohya's names
    ".lora": "LoRA weights: merge them into a model first",  # diffusers' names
    "emb_params": "a textual inversion",
    "control_model.": "a ControlNet",
}

# ---- Folders -------------------------------------------------------------------------------------
# Settings in config.json that must have this value, for each part of a folder. Any other value
# means another architecture, whose tensors might fit but whose images would be wrong.
BUILT_IN = {
    "unet": {
        "_class_name": "UNet2DConditionModel",
        "in_channels": 4,  # 9 in inpainting models, 8 in InstructPix2Pix
        "out_channels": 4,
        "act_fn": "silu",
        "center_input_sample": False,  # would map latents from [0,1] to [-1,1]
        "mid_block_scale_factor": 1,  # would divide the sums in the middle block
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "transformer_layers_per_block": 1,  # several in SDXL
        "dual_cross_attention": False,  # Versatile Diffusion
        "only_cross_attention": False,  # no self-attention, as in the SD x4 upscaler
        "resnet_time_scale_shift": "default",  # the timestep would scale, too
        "time_embedding_type": "positional",  # sinusoids, not random Fourier features
        "time_embedding_dim": None,  # four times the first block's channels
        "time_embedding_act_fn": None,  # an activation after the embedding
        "resnet_skip_time_act": False,  # no SiLU on the embedding in residual blocks
        "resnet_out_scale_factor": 1.0,  # would divide the sums in residual blocks
        "timestep_post_act": None,  # an activation after the embedding's last layer
        "time_cond_proj_dim": None,  # guidance as an input, as in latent consistency models
        "num_attention_heads": None,  # diffusers refuses it; attention_head_dim means the heads
        "class_embed_type": None,  # class labels as an input
        "num_class_embeds": None,  # class labels as an input, as in the SD x4 upscaler
        "addition_embed_type": None,  # sizes and pooled text as inputs: SDXL
        "encoder_hid_dim": None,  # the context projected first, as in DeepFloyd
        "attention_type": "default",  # "gated" in GLIGEN
        "conv_in_kernel": 3,
        "conv_out_kernel": 3,
    },
    "vae": {
        "_class_name": "AutoencoderKL",
        "in_channels": 3,
        "out_channels": 3,  # 4 where images are transparent
        "act_fn": "silu",
        "latent_channels": 4,  # 16 in SD-3 and FLUX
        "mid_block_add_attention": True,
        "use_quant_conv": True,  # SD-3 and FLUX have none
        "use_post_quant_conv": True,
        "latents_mean": None,  # latents would be normalized channel by channel
        "latents_std": None,
        "shift_factor": None,  # latents would be shifted before they are scaled
    },
    "text_encoder": {
        "model_type": "clip_text_model",
        "layer_norm_eps": 1e-05,
        "use_attention_mask": False,  # would hide the padding
        "transformers_weights": None,  # another file of weights than the usual ones
    },
    "scheduler": {
        "predict_epsilon": True,  # an older spelling of prediction_type "sample" when it is False
        "use_flow_sigmas": False,  # flow matching
        "timestep_type": "discrete",  # "continuous" in Stable Video Diffusion: logarithms of noise
    },
}

# ---- Schedulers ----------------------------------------------------------------------------------
# Every sampler of diffusers that Stable Diffusion is saved with states the noise schedule and the
# prediction type in the same words. The rest of its config says how that sampler works, and nothing
# about the model: clip_sample, thresholding, timestep_spacing, use_karras_sigmas, algorithm_type...

# classes in whose configs missing betas are those of DDIMScheduler
SCHEDULERS = (
    "DDIMScheduler",
    "DDIMParallelScheduler",
    "DDPMScheduler",
    "DDPMParallelScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
)
# classes in whose configs missing betas are others, so that none may be missing
SCHEDULERS_WITH_OTHER_BETAS = (
    "DPMSolverSDEScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "TCDScheduler",
)
BETAS = ("beta_schedule", "beta_start", "beta_end")

# substrings of other classes' names -> why their models cannot be used
FOREIGN_SCHEDULERS = {
    "Flow": "its network predicts a velocity between data and noise, not eps or v",
    "EDM": "its network scales its inputs and outputs by noise levels sigma, not by alpha_bar",
    "CMStochastic": "its network is a consistency model, which predicts images",
    "KarrasVe": "its noise is added to latents that do not shrink: there is no alpha_bar",
    "ScoreSde": "its noise is added to latents that do not shrink: there is no alpha_bar",
    "VQDiffusion": "its latents are discrete",
}
