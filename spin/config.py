"""The settings of the miniature world, of the paper and for SDXL, and where each comes from.

Keys are flags of train.py: `batch_size` is --batch-size. The paper is arXiv 2402.10210; its
settings are in appendix A. Two of them look odd but are the paper's: the 50 steps of iteration 1
end within the 200 warmup steps, and only the first iteration has beta 2000.
"""

#: A list has one value per iteration; its last value is repeated.
TOY = {
    "iterations": 3,
    "steps": [100],
    "lr": [5e-5],  # tuned
    "beta": [2000.0],  # tuned
    "sft_lr": 2e-4,  # tuned
    "dpo_lr": 3e-5,  # tuned
    "dpo_beta": 50.0,  # tuned
    "batch_size": 16,
    "micro_batch": 16,
    "warmup": 10,
    "weight_decay": 0.01,  # AdamW's default, and the paper's
    "clip": 1.0,
    "resolution": 32,
    "flip": 0.0,  # captions say left and right
    "prompt_dropout": 0.0,
    "guidance": 7.5,
    "sampler": "ddim",
    "sampler_steps": 20,
    "generation_batch": 64,
    "grid_prompts": 3,
    "seed": 0,
    "dtype": "float32",  # bfloat16's error in a margin, 2.7e-4, is a logit of 0.3 at this beta
    "compile": False,  # it would take longer than the run
    "deterministic": True,  # its kernels are too small to be slowed down
}

PAPER = {
    "iterations": 3,
    "steps": [50, 500, 200],
    "lr": [2e-5, 2e-5, 5e-8],
    "beta": [2000.0, 5000.0, 5000.0],
    "sft_lr": 1e-5,
    "dpo_lr": 2e-5,
    "dpo_beta": 2000.0,
    "batch_size": 2048,
    "micro_batch": 16,  # assumed: it fits into 48 GB, and changes no result; the paper has 8
    "warmup": 200,
    "weight_decay": 0.01,
    "clip": 1.0,  # assumed: as in Diffusion-DPO's public code
    "resolution": 512,
    "flip": 0.5,  # assumed: as in Diffusion-DPO's public code
    "prompt_dropout": 0.0,  # assumed: Diffusion-DPO's public code drops a fifth
    "guidance": 7.5,
    "sampler": "ddim",  # assumed
    "sampler_steps": 50,  # assumed: as in the authors' demo
    "generation_batch": 32,  # assumed: it changes no more than rounding
    "grid_prompts": 4,  # assumed: it is for looking only
    "seed": 5775709,
    "dtype": None,  # bfloat16 on CUDA, else float32; the paper does not say
    "compile": None,  # on CUDA alone
    "deterministic": False,  # a tenth slower, uncompiled; the paper does not say
}

#: For SDXL, which SPIN's authors did not train: PAPER, but for what Diffusion-DPO's public code
#: sets for SDXL (github.com/SalesforceAIResearch/DiffusionDPO: launchers/sdxl.sh, train.py and
#: quick_samples.ipynb). That code has Adafactor, and no decay after the warmup.
PAPER_SDXL = {
    **PAPER,
    "lr": [2.048e-5],  # 1e-8 times its batch of 2048
    "beta": [5000.0],
    "dpo_lr": 2.048e-5,
    "dpo_beta": 5000.0,
    "micro_batch": 1,
    "resolution": 1024,
    "prompt_dropout": 0.2,  # there, the empty prompt is encoded; here, no prompt is zeros
    "guidance": 5.0,
    "generation_batch": 4,  # assumed: it changes no more than rounding
}

#: The defaults that --preset chooses from.
PRESETS = {"toy": TOY, "paper": PAPER, "paper-sdxl": PAPER_SDXL}

#: how long `python train.py` took when it was last measured
STORY_TIME = "8 minutes on two idle CPU cores"

#: Settings of PAPER that the paper does not state.
ASSUMED = (
    "micro_batch",
    "clip",
    "flip",
    "prompt_dropout",
    "sampler",
    "sampler_steps",
    "generation_batch",
    "grid_prompts",
)

#: The settings that not all losses have. TOY's values of them are the best of seven trials on the
#: validation prompts (tutorial/tune_toy.py).
LOSS_SETTINGS = {
    "spin": ("lr", "beta"),
    "spin-bounded": ("lr", "beta"),
    "sft": ("sft_lr",),
    "dpo": ("dpo_lr", "dpo_beta"),
}


def describe_default(name: str) -> str:
    """Return a setting's values and their sources, for --help: "toy: 16; paper: 2048".

    PAPER_SDXL is left out, where few values are others.
    """
    descriptions = []
    for preset, values in (("toy", TOY), ("paper", PAPER)):
        source = ""
        if preset == "toy" and any(name in names for names in LOSS_SETTINGS.values()):
            source = ", tuned"
        if preset == "paper" and name in ASSUMED:
            source = ", assumed"
        descriptions.append(f"{preset}: {format_value(values[name])}{source}")
    return "; ".join(descriptions)


def format_value(value) -> str:
    """Return a setting as it is given on the command line: 2e-05, "50 500 200"."""
    if isinstance(value, list):
        return " ".join(format_value(each) for each in value)
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)
