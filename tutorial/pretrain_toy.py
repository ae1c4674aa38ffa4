"""Pretrain the miniature world's base checkpoint: a tiny Stable Diffusion, from random weights.

    python tutorial/pretrain_toy.py --out runs/base        (about an hour on one CPU core)

There are three stages, each a folder of --out in the diffusers layout. A finished one is kept.

    vae        the autoencoder, trained on web images (its UNet is still random)
    web        UNet and text encoder, trained on web images with their careless captions
    theta_0    the same, fine-tuned (SFT) on the curated set until it gets no better

--out/pretrain.json holds how long each stage took, and what its checkpoint scores on the
validation prompts. spin/toy/base is theta_0 with that file in it.
"""

import argparse
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
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
from spin.infra.cli import SEED_TYPE, number, provenance, run_script  # noqa: E402
from spin.infra.errors import InputError  # noqa: E402
from spin.infra.files import atomic_write, read_json, write_json  # noqa: E402
from spin.sampler import decode_latents, sample  # noqa: E402
from spin.scheduler import Scheduler, add_noise  # noqa: E402
from spin.text import BOS, EOS, TextEncoder, Tokenizer  # noqa: E402
from spin.toy.pictures import (  # noqa: E402
    careless_caption,
    curated_image,
    curated_set,
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
    "max_position_embeddings": 77,
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
PROMPT_DROPOUT = 0.1  # captions replaced by "", so that guidance has an unconditional model

WARMUP = 100  # optimizer steps
SAMPLING_STEPS = 20
GUIDANCE = 3.0


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
        help=f"optimizer steps of the autoencoder, {VAE_BATCH} web images each "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--vae", help="checkpoint whose autoencoder to take (default: none, train one)"
    )
    parser.add_argument(
        "--web-steps",
        type=count,
        default=9000,
        help=f"optimizer steps on web images, {UNET_BATCH} each (default: %(default)s)",
    )
    parser.add_argument(
        "--sft-steps",
        type=count,
        default=2500,
        help=f"optimizer steps on the curated set, {UNET_BATCH} images each (default: %(default)s)",
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
    web_captions = [careless_caption(scene, rng) for scene in scenes]
    # Edges that web images blur are sharp in clean ones: the autoencoder has to keep both.
    clean_images = to_tensor([curated_image(scene, rng) for scene in scenes[::2]])
    all_images = torch.cat([web_images[::2], clean_images])
    curated = list(curated_set())
    curated_images = to_tensor([image for _, image, _ in curated])
    curated_captions = [caption for caption, _, _ in curated]

    # ---- The autoencoder ----
    if args.vae:
        pipe = new_pipeline(args.seed)
        pipe.vae = load_pipeline(args.vae).vae
    else:
        if not (out / "vae").exists():
            began = time.perf_counter()
            pipe = new_pipeline(args.seed)
            loss = train_vae(pipe.vae, all_images, args.vae_steps, args.seed)
            facts = {"steps": args.vae_steps, "loss": loss, "ceiling": score_vae(pipe)}
            finish_stage(out, "vae", pipe, report, began, facts)
        pipe = load_pipeline(out / "vae")

    # ---- Pretraining on web images ----
    if not (out / "web").exists():
        began = time.perf_counter()
        latents = encode(pipe.vae, web_images)
        loss = train_unet(pipe, latents, web_captions, args.web_steps, args.seed + 1)
        facts = {"steps": args.web_steps, "loss": loss, **score_samples(pipe)}
        finish_stage(out, "web", pipe, report, began, facts)
    pipe = load_pipeline(out / "web")

    # ---- Fine-tuning on the curated set ----
    if not (out / "theta_0").exists():
        began = time.perf_counter()
        latents = encode(pipe.vae, curated_images)
        loss = train_unet(pipe, latents, curated_captions, args.sft_steps, args.seed + 2)
        facts = {"steps": args.sft_steps, "loss": loss, **score_samples(pipe)}
        finish_stage(out, "theta_0", pipe, report, began, facts)
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
    return report


def finish_stage(
    out: Path, name: str, pipe: Pipeline, report: dict, began: float, facts: dict
) -> None:
    """Write a stage's checkpoint, add it to the report, and write that."""
    with atomic_write(out / name) as folder:
        save_pipeline(pipe, folder)
    seconds = round(time.perf_counter() - began)
    report[name] = {"commit": provenance()["commit"], "seconds": seconds, **facts}
    write_json(out / "pretrain.json", report)
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
    return Tokenizer(sorted(needed, key=rank.get))


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


def train_vae(vae: AutoencoderKL, images: Tensor, steps: int, seed: int) -> float:
    """Train the autoencoder on images [N,3,32,32], and give it its scaling factor.

    Return the mean loss of the last tenth of the steps.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(vae.parameters(), fused=True)
    losses = []
    for step in tqdm(range(1, steps + 1), "vae", mininterval=10):
        rows = torch.randint(len(images), (VAE_BATCH,), generator=generator)
        x = images[rows]
        mean, logvar = vae.encode(x)
        z = mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=generator)
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        loss = F.mse_loss(vae.decode(z), x) + KL_WEIGHT * kl
        take_step(optimizer, loss, learning_rate(VAE_LR, step, steps))
        losses.append(loss.item())

    mean, logvar = encode(vae, images[:4096])
    variance = mean.var() + logvar.exp().mean()
    vae.scaling_factor = float(variance.rsqrt())  # scaled latents have unit variance
    return mean_of_last_tenth(losses)


def train_unet(
    pipe: Pipeline, latents: tuple[Tensor, Tensor], captions: list[str], steps: int, seed: int
) -> float:
    """Train UNet and text encoder to predict the noise, equation (3.3).

    latents: mean and log-variance, [N,4,8,8] each.
    captions: N of them.
    Return the mean loss of the last tenth of the steps.
    """
    mean, logvar = latents
    alphas_cumprod = pipe.scheduler.alphas_cumprod
    generator = torch.Generator().manual_seed(seed)
    parameters = [*pipe.unet.parameters(), *pipe.text_encoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, fused=True)
    losses = []
    for step in tqdm(range(1, steps + 1), f"{len(captions)} captions", mininterval=10):
        rows = torch.randint(len(mean), (UNET_BATCH,), generator=generator)
        posterior, eps = torch.randn((2, UNET_BATCH, *mean.shape[1:]), generator=generator)
        t = torch.randint(len(alphas_cumprod), (UNET_BATCH,), generator=generator)
        drop = torch.rand(UNET_BATCH, generator=generator) < PROMPT_DROPOUT

        x0 = mean[rows] + (0.5 * logvar[rows]).exp() * posterior
        x_t = add_noise(x0 * pipe.vae.scaling_factor, eps, alphas_cumprod[t])
        prompts = [captions[row] for row in rows.tolist()]
        for i in drop.nonzero().flatten().tolist():
            prompts[i] = ""
        context = pipe.encode_prompts(prompts)
        loss = F.mse_loss(pipe.unet(x_t, t, context), eps)
        take_step(optimizer, loss, learning_rate(UNET_LR, step, steps))
        losses.append(loss.item())
    return mean_of_last_tenth(losses)


def take_step(optimizer: torch.optim.Optimizer, loss: Tensor, lr: float) -> None:
    """Take one optimizer step down the gradient of `loss`, which is clipped to norm 1."""
    [group] = optimizer.param_groups
    loss.backward()
    torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
    group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()


def learning_rate(peak: float, step: int, steps: int) -> float:
    """Return the learning rate at `step` (1-based): linear warm-up, cosine decay to 0."""
    warmup = min(1, step / WARMUP)
    return peak * warmup * 0.5 * (1 + math.cos(math.pi * step / steps))


def mean_of_last_tenth(losses: list[float]) -> float:
    last = losses[-math.ceil(len(losses) / 10) :]
    return sum(last) / len(last)


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


if __name__ == "__main__":
    advice = "finished stages are kept; the same command goes on"
    sys.exit(run_script("pretrain_toy.py", main, advice))
