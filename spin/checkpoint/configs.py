"""Facts about published checkpoints that the checkpoints do not state themselves."""

# ---- Single files --------------------------------------------------------------------------------
# A file in the original layout holds no config. SD_1, SD_2 and SDXL hold the config.json contents
# of the same models' diffusers folders, one entry per part.

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

# Stable Diffusion XL base
SDXL = {
    "unet": {
        "sample_size": 128,  # latents of 1024 px
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": [320, 640, 1280],
        "layers_per_block": 2,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "transformer_layers_per_block": [1, 2, 10],
        "cross_attention_dim": 2048,  # both text towers' hidden_size
        "attention_head_dim": [5, 10, 20],  # heads of each block
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "norm_num_groups": 32,
        "act_fn": "silu",
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,  # 1280 + 6 * 256
    },
    "vae": {**SD_1["vae"], "sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
    "text_encoder": SD_1["text_encoder"],
    # OpenCLIP's ViT-bigG/14
    "text_encoder_2": {
        "vocab_size": 49408,
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "max_position_embeddings": 77,
        "hidden_act": "gelu",
        "projection_dim": 1280,
    },
    "scheduler": {
        **SD_1["scheduler"],
        "_class_name": "EulerDiscreteScheduler",
        "timestep_spacing": "leading",
    },
}

# family of models -> what a file may say of the layers that its text towers return
TEXT_LAYERS = {"1.x": ("last",), "2.x": ("penultimate",), "XL": ("hidden", "penultimate")}
# family of models -> scaling_factor of the VAE in every such file
SCALING_FACTORS = {"1.x": 0.18215, "2.x": 0.18215, "XL": 0.13025}

# Settings that networks use -> the value of a config without them. A single file states none of
# them. Left out are those that BUILT_IN below fixes, sample_size (a default, not a fact about the
# weights) and force_upcast (how exactly a VAE computes).
SETTINGS = {
    "unet": {
        "block_out_channels": None,
        "layers_per_block": 2,
        "down_block_types": None,
        "up_block_types": None,
        "cross_attention_dim": None,
        "attention_head_dim": 8,
        "norm_num_groups": 32,
        "norm_eps": 1e-5,
        "use_linear_projection": False,
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "transformer_layers_per_block": 1,
        "addition_embed_type": None,
        "addition_time_embed_dim": None,
        "projection_class_embeddings_input_dim": None,
    },
    "vae": {
        "block_out_channels": None,
        "layers_per_block": 1,
        "norm_num_groups": 32,
    },
    "text_encoder": {
        "hidden_size": None,
        "intermediate_size": None,
        "num_hidden_layers": None,
        "num_attention_heads": None,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu",
    },
}

SETTINGS["text_encoder_2"] = {**SETTINGS["text_encoder"], "projection_dim": None}

# Where the metadata of a .safetensors file may say what its UNet predicts, and in which words, in
# lower case. None says nothing.
PREDICTION_METADATA = {
    "prediction_type": {
        "epsilon": "epsilon",
        "eps": "epsilon",
        "v": "v_prediction",
        "v_prediction": "v_prediction",
    },
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
    "ss_v_parameterization": {  # kohya's, like those that follow
        "false": "epsilon",
        "0": "epsilon",
        "true": "v_prediction",
        "1": "v_prediction",
        "none": None,
    },
    "ss_base_model_version": {"sd_v1_v": "v_prediction", "sd_v2_v": "v_prediction"},
}
# In these keys, any other word is refused; in the others, it is ignored.
PREDICTION_KEYS = (
    "prediction_type",
    "modelspec.prediction_type",
    "modelspec.predict_key",
    "ss_v_parameterization",
)
# Where the metadata may say that the model is another one, and substrings of the words that do.
ARCHITECTURE_KEYS = ("modelspec.architecture", "ss_base_model_version")
FOREIGN_ARCHITECTURES = (
    "xl",  # foreign to Stable Diffusion 1.x and 2.x alone
    "refiner",
    "v3",
    "sd3",
    "flux",
    "inpaint",
    "pix2pix",
    "depth",
    "unclip",
)

# names of empty tensors, which ComfyUI reads as statements about a file's model
V_MARKER = "v_pred"  # its UNet predicts v
ZERO_SNR_MARKER = "ztsnr"  # its schedule ends at pure noise (a terminal SNR of zero)

# keys of the metadata or of a .yaml that say the same of the schedule
ZERO_SNR_KEYS = (
    "rescale_betas_zero_snr",
    "zero_terminal_snr",
    "ss_zero_terminal_snr",
    "zsnr",
    "ztsnr",
)
# the words for yes and no, in lower case
BOOLEANS = {
    "true": True,
    "yes": True,
    "on": True,
    "1": True,
    "false": False,
    "no": False,
    "off": False,
    "0": False,
    "none": False,
    "null": False,
}

# What a .yaml beside a file (MODEL.yaml and MODEL.ckpt) says of a UNet's prediction, under
# PREDICTION_YAML_KEYS in the original layout, or by the class of its scaling in a later one.
PREDICTION_YAML_KEYS = ("parameterization", "prediction_type")
PREDICTION_YAML = {
    "eps": "epsilon",
    "epsilon": "epsilon",
    "v": "v_prediction",
    "v_prediction": "v_prediction",
    "EpsScaling": "epsilon",
    "VScaling": "v_prediction",
}
# keys of such a .yaml -> the values that are assumed of every file
YAML_BUILT_IN = {
    "beta_schedule": "linear",  # of sqrt(beta): "scaled_linear" in diffusers
    "linear_start": 0.00085,  # beta_start
    "linear_end": 0.012,  # beta_end
    "timesteps": 1000,
    "num_timesteps": 1000,
    "num_idx": 1000,
    "layer_idx": 11,  # which "layer: hidden" SDXL's first text tower returns
}
DISCRETIZATION = "LegacyDDPMDiscretization"  # the class of the noise levels in later files

# substrings of tensor names -> what a file with such names really is
FOREIGN = {
    "conditioner.embedders.0.model.": "SDXL's refiner, or SD-Turbo",
    "joint_blocks.": "SD-3",
    "double_blocks.": "FLUX",
    "lora_": "LoRA weights: merge them into a model first",  # kohya's names
    ".lora": "LoRA weights: merge them into a model first",  # diffusers' names
    "emb_params": "a textual inversion",
    "control_model.": "a ControlNet",
}

# Other tensors that a training leaves in a file, which say nothing about its networks. Exact names,
# or the beginnings of names if they end with a dot.
LEFTOVERS = (
    "model_ema.",  # an average of the UNet's weights
    "first_stage_model.loss.",  # what trained the VAE
    "first_stage_model.model_ema.",
    "safety_checker.",
    # the rest of a CLIP: its projections, its other tower, its 24th layer, and the numbers 0 to 76
    "cond_stage_model.logit_scale",
    "cond_stage_model.text_projection",
    "cond_stage_model.transformer.logit_scale",
    "cond_stage_model.transformer.text_projection",
    "cond_stage_model.transformer.text_projection.weight",
    "cond_stage_model.transformer.visual_projection.weight",
    "cond_stage_model.transformer.vision_model.",
    "cond_stage_model.transformer.embeddings.position_ids",
    "cond_stage_model.transformer.text_model.embeddings.position_ids",
    "cond_stage_model.model.logit_scale",
    "cond_stage_model.model.logit_bias",
    "cond_stage_model.model.text_projection",
    "cond_stage_model.model.text_projection.weight",
    "cond_stage_model.model.attn_mask",
    "cond_stage_model.model.visual.",
    "cond_stage_model.model.transformer.resblocks.23.",
    "conditioner.embedders.0.logit_scale",
    "conditioner.embedders.0.text_projection.weight",
    "conditioner.embedders.0.transformer.logit_scale",
    "conditioner.embedders.0.transformer.text_projection.weight",
    "conditioner.embedders.0.transformer.text_model.embeddings.position_ids",
    "conditioner.embedders.1.logit_scale",
    "conditioner.embedders.1.model.logit_scale",
    "conditioner.embedders.1.model.logit_bias",
    "conditioner.embedders.1.model.attn_mask",
    "conditioner.embedders.1.model.visual.",
    "conditioner.embedders.1.model.transformer.text_model.embeddings.position_ids",
    # steps of the training
    "global_step",
    "step",
    "epoch",
    "iteration",
    # what the original code computes from alphas_cumprod
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "lvlb_weights",
    "logvar",
    "denoiser.log_sigmas",
)
# other tensors that are read: the noise schedule in several forms, and the VAE's scaling_factor
SCHEDULE_TENSORS = ("betas", "alphas_cumprod", "denoiser.sigmas")
SCALE_TENSOR = "scale_factor"

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
        "reverse_transformer_layers_per_block": None,  # the way up mirrors the way down
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
        "thresholding": False,  # would bound the predicted latents by their own quantile
    },
}

BUILT_IN["text_encoder_2"] = BUILT_IN["text_encoder"]

# in_channels of other UNets -> what they are
OTHER_INPUTS = {
    8: "an edit model (InstructPix2Pix), which reads an image, too",
    9: "an inpainting model, which reads an image and a mask, too",
}

# What model_index.json may say: the classes of the parts that are read (a scheduler's are below),
# and the names of parts that change no image.
PART_CLASSES = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel",),
    "text_encoder_2": ("CLIPTextModelWithProjection",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "tokenizer_2": ("CLIPTokenizer", "CLIPTokenizerFast"),
}
UNUSED_PARTS = ("safety_checker", "feature_extractor")

# substrings of pipelines' class names -> why their parts cannot be used
FOREIGN_PIPELINES = {
    "AltDiffusion": "its text encoder is not CLIP's",
    "LatentConsistency": "its UNet is distilled, and images are made without classifier-free "
    "guidance",
    "GLIGEN": "its UNet has boxes as an input",
    "XLImg2Img": "an image-to-image model such as SDXL's refiner, which starts from images",
    "XLInpaint": "an inpainting model",
    "XLInstructPix2Pix": "an edit model",
}

# files in a folder that is taken for a model by mistake -> what the folder really holds
OTHER_FOLDERS = {
    "pytorch_lora_weights.safetensors": "LoRA weights: merge them into a model first",
    "pytorch_lora_weights.bin": "LoRA weights: merge them into a model first",
    "adapter_config.json": "LoRA weights: merge them into a model first",  # peft's
    "learned_embeds.safetensors": "a textual inversion, which is not supported",
    "learned_embeds.bin": "a textual inversion, which is not supported",
    "random_states_0.pkl": "a training state of accelerate, whose weights have no config: choose "
    "the folder of the model that the training saved",
}

# ---- Schedulers ----------------------------------------------------------------------------------
# Every sampler of diffusers that Stable Diffusion is saved with states the noise schedule and the
# prediction type in the same words. The rest of its config says how that sampler works, and nothing
# about the model: clip_sample, timestep_spacing, use_karras_sigmas, algorithm_type...

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
