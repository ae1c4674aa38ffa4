"""Pretrain the miniature world's base checkpoint: a tiny Stable Diffusion, from random weights.

    python tutorial/pretrain_toy.py --out runs/base

It takes about 70 minutes of one CPU core: 27 for the autoencoder, 34 for the base, and up to 7 for
the preferences.

There are two stages, each a folder of --out in the diffusers layout:

    vae     the autoencoder, trained on web and on clean images (its UNet is still random)
    base    UNet and text encoder, trained on web images with their careless captions: theta_0

base/preferences.safetensors holds the pairs of images that Diffusion-DPO trains on: two drawings
of theta_0 for each caption of the curated set, the better one and the worse one.

--out/pretrain.json holds how long each stage took, and what its checkpoint scores on the
validation prompts. spin/toy/base is the folder base with that file in it.

spin/toy/base was made by two runs: its autoencoder by one, the rest by one with --vae.

After an interruption, the same command goes on from the last state, which is saved every 500
steps, to the same weights. Another base with the same autoencoder: --seed 1 --vae runs/base/vae
"""

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from spin import toy  # noqa: E402
from spin.checkpoint import (  # noqa: E402
    Pipeline,
    hash_checkpoint,
    load_pipeline,
    locate,
    save_pipeline,
)
from spin.config import TOY  # noqa: E402
from spin.data import noise_generator  # noqa: E402
from spin.infra.cli import SEED_TYPE, number, provenance, run_script  # noqa: E402
from spin.infra.errors import InputError  # noqa: E402
from spin.infra.files import atomic_write, read_json, remove, write_json  # noqa: E402
from spin.sampler import decode_latents, sample  # noqa: E402
from spin.scheduler import Scheduler, add_noise  # noqa: E402
from spin.text import BOS, EOS, TextEncoder, Tokenizer  # noqa: E402
from spin.toy import NUM_ROWS, Scene  # noqa: E402
from spin.toy.pictures import (  # noqa: E402
    careless_description,
    curated_image,
    curated_row,
    web_image,
)
from spin.unet import UNet  # noqa: E402
from spin.vae import AutoencoderKL  # noqa: E402

# The networks, by the names of diffusers' and transformers' config.json.
UNET = {
    "sample_size": 8,
    "block_out_channels": [32, 64],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "cross_attention_dim": 64,
    "attention_head_dim": 2,
    "norm_num_groups": 8,
    "in_channels": 4,
    "out_channels": 4,
    "act_fn": "silu",
}
VAE = {
    "sample_size": 32,
    "block_out_channels": [32, 48, 64],
    "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D", "DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "act_fn": "silu",
}
TEXT_ENCODER = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 20,  # captions have at most 14 tokens
    "projection_dim": 64,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-05,
}
SCHEDULER = {  # Stable Diffusion's
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "prediction_type": "epsilon",
}

VAE_BATCH = 16
VAE_LR = 2e-3
KL_WEIGHT = 3e-4  # of the latents' KL divergence from N(0,1), beside the pixels' squared error

UNET_BATCH = 64
UNET_LR = 1e-3
WEIGHT_POWER = 0.5  # see `timestep_weights`
PROMPT_DROPOUT = 0.1  # captions replaced by "", so that guidance has an unconditional model

WARMUP = 100  # optimizer steps
SAVE_EVERY = 500  # optimizer steps between two states to resume from

# How images are sampled, for the score and for the preferences: as in train.py's story.
SAMPLING_STEPS = TOY["sampler_steps"]
GUIDANCE = TOY["guidance"]
SAMPLING_BATCH = 64
PREFERENCES_ITERATION = 0  # train.py counts its iterations from 1: its noise is other noise


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    count = number(int, 1)
    parser.add_argument(
        "--out", default="runs/base", help="folder for the stages (default: %(default)s)"
    )
    parser.add_argument(
        "--images",
        type=count,
        default=40_000,
        help="web images to train on (default: %(default)s)",
    )
    parser.add_argument(
        "--vae-steps",
        type=count,
        default=7000,
        help=f"optimizer steps of the autoencoder, {VAE_BATCH} images each (default: %(default)s)",
    )
    parser.add_argument(
        "--vae", help="checkpoint whose autoencoder to take (default: none, train one)"
    )
    parser.add_argument(
        "--steps",
        type=count,
        default=12_000,
        help=f"optimizer steps of UNet and text encoder, {UNET_BATCH} web images each "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--rows",
        type=number(int, 1, NUM_ROWS),
        default=NUM_ROWS,
        help="rows of the curated set to draw preferences for (default: %(default)s, which is all, "
        "as train.py needs)",
    )
    parser.add_argument(
        "--seed",
        type=SEED_TYPE,
        default=0,
        help="of weights, images and noise (default: %(default)s)",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict:
    """Train what is missing. Return what pretrain.json holds."""
    args = parse(argv)
    out = Path(args.out)
    report = begin_report(out, args)

    # ---- Data ----
    rng = np.random.default_rng(args.seed)
    choices = rng.integers(len(toy.SCENES), size=args.images)
    scenes = [toy.SCENES[i] for i in choices]
    web_images = to_tensor([web_image(scene, rng) for scene in scenes])
    web_captions = [careless_description(scene, rng).caption for scene in scenes]

    # ---- The autoencoder ----
    vae_folder = args.vae
    if not args.vae:
        vae_folder = out / "vae"
        if not vae_folder.exists():
            # Edges that web images blur are sharp in clean ones: it has to keep both.
            clean_images = to_tensor([curated_image(scene, rng) for scene in scenes[::2]])
            images = torch.cat([web_images[::2], clean_images])
            pipe = new_pipeline(args.seed)
            facts = train_vae(pipe.vae, images, args.vae_steps, args.seed, out / "vae-state.pt")
            facts["ceiling"] = score_vae(pipe)
            finish_stage(out, "vae", pipe, report, facts)

    # ---- Pretraining on web images ----
    if not (out / "base").exists():
        pipe = new_pipeline(args.seed)
        pipe.vae = load_pipeline(vae_folder).vae
        latents = encode(pipe.vae, web_images)
        facts = train_unet(
            pipe, latents, web_captions, args.steps, args.seed + 1, out / "base-state.pt"
        )
        facts.update(score_samples(pipe))
        finish_stage(out, "base", pipe, report, facts)

    # ---- Preferences for Diffusion-DPO ----
    preferences = out / "base" / toy.PREFERENCES
    if not preferences.exists():
        pipe = load_pipeline(out / "base").freeze()
        tensors = draw_preferences(pipe, args.rows, args.seed)
        with atomic_write(preferences) as temporary:
            save_file(tensors, temporary, {"model_hash": hash_checkpoint(out / "base")})
    return report


# ---- The stages' report --------------------------------------------------------------------------


def begin_report(out: Path, args: argparse.Namespace) -> dict:
    """Return what pretrain.json holds so far, with this run's settings.

    Raises InputError if the stages in `out` were started with other settings.
    """
    report = {}
    if (out / "pretrain.json").exists():
        report = read_json(out / "pretrain.json")

    # Folders may be moved, so their paths do not count.
    flags = {**vars(args)}
    del flags["out"]
    if args.vae:
        flags["vae"] = hash_checkpoint(locate(args.vae))
    earlier = report.get("flags", flags)
    if earlier != flags:
        raise InputError(f"{out}: started with {earlier}. Choose another --out")

    report["flags"] = flags
    report["threads"] = torch.get_num_threads()
    report["versions"] = provenance()["versions"]
    write_json(out / "pretrain.json", report)  # a state to resume from is of these settings
    return report


def finish_stage(out: Path, name: str, pipe: Pipeline, report: dict, facts: dict) -> None:
    """Write a stage's checkpoint, add it to the report, write that, and delete the state."""
    report[name] = {"commit": provenance()["commit"], **facts}
    write_json(out / "pretrain.json", report)
    with atomic_write(out / name) as folder:
        save_pipeline(pipe, folder)
    remove(out / f"{name}-state.pt")
    print(name, report[name])


# ---- A model with random weights -----------------------------------------------------------------


def new_pipeline(seed: int) -> Pipeline:
    """Return all four parts, the networks' weights drawn from `seed`."""
    tokenizer = small_tokenizer()
    text_config = {
        **TEXT_ENCODER,
        "vocab_size": len(tokenizer.vocab),
        "bos_token_id": tokenizer.vocab[BOS],
        "eos_token_id": tokenizer.vocab[EOS],
    }
    # Modules draw their weights from the global generator, which is left as it was.
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        text_encoder = TextEncoder(text_config, tokenizer)
        unet = UNet(UNET)
        vae = AutoencoderKL(VAE)
    return Pipeline(unet, vae, text_encoder, Scheduler(SCHEDULER))


def small_tokenizer() -> Tokenizer:
    """Return CLIP's tokenizer with only those of its 48,894 merges that the captions need."""
    clip = Tokenizer()
    rank = {merge: i for i, merge in enumerate(clip.merges)}
    words = set()
    for scene in toy.SCENES:
        words.update(scene.caption.split())

    needed = set()
    for word in words:
        needed.update(merges_of_word(word, rank))
    return Tokenizer(
        sorted(needed, key=rank.get), length=TEXT_ENCODER["max_position_embeddings"]
    )


def merges_of_word(word: str, rank: dict[str, int]) -> list[str]:
    """Return the merges, "a b", by which byte-pair encoding makes one token of a word.

    rank: of every merge. Of the pairs of neighbors, the one with the lowest rank is merged first.
    """
    parts = [*word[:-1], word[-1] + "</w>"]
    merges = []
    while len(parts) > 1:
        pairs = [f"{left} {right}" for left, right in zip(parts, parts[1:])]
        ranks = [rank.get(pair, math.inf) for pair in pairs]
        first = ranks.index(min(ranks))
        merges.append(pairs[first])
        parts[first : first + 2] = [parts[first] + parts[first + 1]]
    return merges


# ---- Training ------------------------------------------------------------------------------------


def train_vae(vae: AutoencoderKL, images: Tensor, steps: int, seed: int, state: Path) -> dict:
    """Train the autoencoder on images [N,3,32,32], give it its scaling factor, return `train`'s."""

    def compute_loss(generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(images), (VAE_BATCH,), generator=generator)
        x = images[rows]
        mean, logvar = vae.encode(x)
        z = mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=generator)
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        return F.mse_loss(vae.decode(z), x) + KL_WEIGHT * kl

    facts = train(list(vae.parameters()), compute_loss, steps, VAE_LR, seed, state)
    mean, logvar = encode(vae, images[:4096])
    variance = mean.var() + logvar.exp().mean()
    vae.scaling_factor = float(variance.rsqrt())  # scaled latents have unit variance
    return facts


def train_unet(
    pipe: Pipeline,
    latents: tuple[Tensor, Tensor],
    captions: list[str],
    steps: int,
    seed: int,
    state: Path,
) -> dict:
    """Train UNet and text encoder to predict the noise, equation (3.3). Return `train`'s facts.

    latents: mean and log-variance, [N,4,8,8] each.
    captions: N of them.
    """
    mean, logvar = latents
    alphas_cumprod = pipe.scheduler.alphas_cumprod
    weights = timestep_weights(alphas_cumprod)

    def compute_loss(generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(mean), (UNET_BATCH,), generator=generator)
        posterior, eps = torch.randn((2, UNET_BATCH, *mean.shape[1:]), generator=generator)
        t = torch.randint(len(alphas_cumprod), (UNET_BATCH,), generator=generator)
        drop = torch.rand(UNET_BATCH, generator=generator) < PROMPT_DROPOUT

        x0 = mean[rows] + (0.5 * logvar[rows]).exp() * posterior
        x_t = add_noise(x0 * pipe.vae.scaling_factor, eps, alphas_cumprod[t])
        prompts = [captions[row] for row in rows.tolist()]
        for i in drop.nonzero().flatten().tolist():
            prompts[i] = ""
        prediction = pipe.unet(x_t, t, pipe.encode_prompts(prompts))
        errors = (prediction - eps).square().mean((1, 2, 3))
        return (weights[t] * errors).mean()

    parameters = [*pipe.unet.parameters(), *pipe.text_encoder.parameters()]
    return train(parameters, compute_loss, steps, UNET_LR, seed, state)


def timestep_weights(alphas_cumprod: Tensor) -> Tensor:
    """Return the weight [T] of each timestep's squared error of the noise; their mean is 1.

    What the caption decides, where the shape is and of which color, is decided at high noise. There
    the noise is nearly the input itself, so that its error is small however wrong the image is.
    Weighted equally, the words are learned later.
    """
    weights = alphas_cumprod**-WEIGHT_POWER
    return weights / weights.mean()


def train(
    parameters: list[torch.nn.Parameter],
    compute_loss: Callable[[torch.Generator], Tensor],
    steps: int,
    peak_lr: float,
    seed: int,
    state: Path,
) -> dict:
    """Take the optimizer steps that are left, and return how many there were, loss and seconds.

    compute_loss: returns the loss of a batch that it draws from the generator.
    state: file from which training resumes if it is there, and where it is saved meanwhile.
    The loss is the mean of the last tenth of the steps; the seconds are those of all starts.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(parameters, fused=True)
    losses = []
    seconds = 0.0
    if state.exists():
        saved = torch.load(state)
        for parameter, values in zip(parameters, saved["parameters"], strict=True):
            parameter.data.copy_(values)
        optimizer.load_state_dict(saved["optimizer"])
        generator.set_state(saved["generator"])
        losses = saved["losses"]
        seconds = saved["seconds"]

    began = time.perf_counter() - seconds
    bar = tqdm(range(len(losses) + 1, steps + 1), state.stem, mininterval=10)
    for step in bar:
        loss = compute_loss(generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.param_groups[0]["lr"] = learning_rate(peak_lr, step, steps)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % SAVE_EVERY == 0:
            values = {
                "parameters": [parameter.detach() for parameter in parameters],
                "optimizer": optimizer.state_dict(),
                "generator": generator.get_state(),
                "losses": losses,
                "seconds": time.perf_counter() - began,
            }
            with atomic_write(state) as temporary:
                torch.save(values, temporary)

    last_tenth = losses[-math.ceil(len(losses) / 10) :]
    return {
        "steps": steps,
        "loss": sum(last_tenth) / len(last_tenth),
        "seconds": round(time.perf_counter() - began),
    }


def learning_rate(peak: float, step: int, steps: int) -> float:
    """Return the learning rate at `step` (1-based): linear warm-up, cosine decay to 0."""
    warmup = min(1, step / WARMUP)
    return peak * warmup * 0.5 * (1 + math.cos(math.pi * step / steps))


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor) -> tuple[Tensor, Tensor]:
    """Encode images [N,3,32,32] in [-1,1] to mean and log-variance, [N,4,8,8] each, unscaled."""
    means = []
    logvars = []
    for batch in images.split(256):
        mean, logvar = vae.encode(batch)
        means.append(mean)
        logvars.append(logvar)
    return torch.cat(means), torch.cat(logvars)


def to_tensor(images: list[np.ndarray]) -> Tensor:
    """Return N images [32,32,3] in [0,1] as a tensor [N,3,32,32] in [-1,1]."""
    stacked = torch.from_numpy(np.stack(images).astype(np.float32))
    return stacked.permute(0, 3, 1, 2).contiguous() * 2 - 1


# ---- Scores --------------------------------------------------------------------------------------


@torch.no_grad()
def score_vae(pipe: Pipeline) -> dict[str, float]:
    """Score the validation prompts' ideal images after encoding and decoding.

    No UNet can be better than that, since all its images are decoded.
    """
    scenes = toy.split()["validation"]
    mean, _ = encode(pipe.vae, to_tensor([toy.ideal_image(scene) for scene in scenes]))
    images = (pipe.vae.decode(mean) / 2 + 0.5).clamp(0, 1)
    return mean_scores(images, [scene.caption for scene in scenes])


def score_samples(pipe: Pipeline) -> dict[str, float]:
    """Score images sampled for the validation prompts."""
    prompts = [scene.caption for scene in toy.split()["validation"]]
    latents = sample(pipe, prompts, steps=SAMPLING_STEPS, guidance=GUIDANCE)
    return mean_scores(decode_latents(pipe, latents), prompts)


def mean_scores(images: Tensor, prompts: list[str]) -> dict[str, float]:
    """Return the mean of each metric over images [N,3,32,32] in [0,1], to four decimals."""
    metrics = toy.score(images.permute(0, 2, 3, 1).numpy(), prompts)
    return {name: round(float(values.mean()), 4) for name, values in metrics.items()}


# ---- Preferences ---------------------------------------------------------------------------------


def draw_preferences(pipe: Pipeline, rows: int, seed: int) -> dict[str, Tensor]:
    """Draw two images for the caption of each of the first rows of the curated set.

    Return the scaled latents of the better ones and of the worse ones, "preferred" and "rejected",
    float16 [rows,4,8,8] each. `nearness_to_description` judges them by what the caption says, as a
    person would, not by the curated image that it belongs to.
    """
    descriptions = [curated_row(row)[0] for row in range(rows)]
    preferred = []
    rejected = []
    for start in tqdm(range(0, rows, SAMPLING_BATCH), "preferences", mininterval=10):
        batch = descriptions[start : start + SAMPLING_BATCH]
        prompts = [description.caption for description in batch]
        latents = []
        nearness = []
        for i in range(2):
            generators = [
                noise_generator(seed, PREFERENCES_ITERATION, 2 * row + i)
                for row in range(start, start + len(batch))
            ]
            x0 = sample(pipe, prompts, SAMPLING_STEPS, GUIDANCE, generators=generators)
            images = decode_latents(pipe, x0).permute(0, 2, 3, 1).numpy()
            latents.append(x0)
            nearness.append(
                [nearness_to_description(*pair) for pair in zip(images, batch, strict=True)]
            )
        first_is_better = torch.tensor(nearness[0]) >= torch.tensor(nearness[1])
        first_is_better = first_is_better[:, None, None, None]
        preferred.append(torch.where(first_is_better, latents[0], latents[1]).half())
        rejected.append(torch.where(first_is_better, latents[1], latents[0]).half())
    return {"preferred": torch.cat(preferred), "rejected": torch.cat(rejected)}


def nearness_to_description(image: np.ndarray, description: Scene) -> float:
    """Return minus the rms distance of an image [32,32,3] to what a caption says.

    A caption may leave attributes open. Of the ideal images of all scenes that it allows, the
    nearest one counts.
    """
    allowed = [toy.ideal_image(scene) for scene in toy.SCENES if allows(description, scene)]
    distances = np.sqrt(((np.stack(allowed) - image) ** 2).mean((1, 2, 3)))
    return float(-distances.min())


def allows(description: Scene, scene: Scene) -> bool:
    """Return whether a scene has all attributes that the description states."""
    for stated, actual in zip(astuple(description), astuple(scene)):
        if stated is not None and stated != actual:
            return False
    return True


if __name__ == "__main__":
    advice = "what was saved is kept; the same command goes on"
    sys.exit(run_script("pretrain_toy.py", main, advice))
