"""How the miniature world's base checkpoint was made: a tiny Stable Diffusion, trained from nothing.

    python tutorial/pretrain.py --out runs/base        (about an hour on one CPU core)

Three stages, each a folder of OUT in the diffusers layout; one that is there is not made again:

    vae        the autoencoder, on web pictures (its UNet has not learned anything)
    web        UNet and text tower, on web pictures with their careless captions
    theta_0    the same, fine-tuned (SFT) on the curated set to its plateau

OUT/pretrain.json says how long each took and what the checkpoints score on the validation prompts. spin/toy/base is
OUT/theta_0 with that file in it.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from spin import sampler  # noqa: E402
from spin.infra import run  # noqa: E402
from spin.toy import world as toy  # noqa: E402
from spin.checkpoint import pipeline as weights  # noqa: E402
from spin.checkpoint.single_file import SD_1  # noqa: E402
from spin.scheduler import Scheduler, add_noise  # noqa: E402
from spin.text import BOS, EOS, TextEncoder, Tokenizer  # noqa: E402
from spin.unet import UNet  # noqa: E402
from spin.vae import AutoencoderKL  # noqa: E402
from spin.toy import pictures as drawing  # noqa: E402

# the networks' sizes are those of the checkpoint that this made
UNET, VAE, TEXT = (run.read_json(toy.BASE / part / "config.json") for part in ("unet", "vae", "text_encoder"))
KL_WEIGHT = 1e-5  # of the latents' KL divergence from N(0,1), beside the mean squared error of pixels
PROMPT_DROPOUT = 0.1  # captions replaced by "", so that guidance has an unconditional model
SAMPLING = {"steps": 20, "guidance": 3.0}  # for the scores


def main(argv: list[str] | None = None) -> dict:
    """Returns what pretrain.json holds: {stage: {"seconds", "steps", "loss", scores}}."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], usage=argparse.SUPPRESS)
    whole = run.number(int, 1)

    def add(flag: str, help: str, **kwargs) -> None:
        parser.add_argument(flag, help=f"{help} (default: {kwargs['default']})", **kwargs)

    add("--out", "folder for the stages", default="runs/base")
    add("--pictures", "web pictures to train on", type=whole, default=40_000)
    add("--vae-steps", "optimiser steps of the autoencoder, 16 pictures each", type=whole, default=6000)
    add("--vae", "checkpoint whose autoencoder to take, instead of training one", default=None)
    add("--web-steps", "optimiser steps on the web pictures, 64 each", type=whole, default=9000)
    add("--sft-steps", "optimiser steps on the curated set, 64 each", type=whole, default=2500)
    add("--seed", "of weights, pictures and noise", type=run.SEED, default=0)
    args = parser.parse_args(argv)
    out, here = Path(args.out), run.provenance()
    report = run.read_json(out / "pretrain.json") if (out / "pretrain.json").exists() else {}
    vae_hash = weights.checkpoint_hash(weights.locate(args.vae)) if args.vae else None
    flags = vars(args) | {"vae": vae_hash}  # wherever it lies
    if (before := report.get("flags", flags) | {"out": args.out}) != flags:
        raise run.InputError(f"{out}: begun with {before}. Choose another --out")
    report |= {"flags": flags, "threads": torch.get_num_threads(), "versions": here["versions"]}

    def stage(name: str, make: Callable[[], tuple[weights.StableDiffusion, dict]]) -> weights.StableDiffusion:
        if not (out / name).exists():
            began = time.perf_counter()
            sd, facts = make()
            with run.whole(out / name) as part:
                weights.save(sd, part)
            report[name] = {"commit": here["commit"], "seconds": round(time.perf_counter() - began)} | facts
            run.write_json(out / "pretrain.json", report)
        print(name, report.get(name, "was there"))
        return weights.load(out / name)

    rng = np.random.default_rng(args.seed)
    scenes = [toy.SCENES[i] for i in rng.integers(len(toy.SCENES), size=args.pictures)]
    pictures = to_tensor([drawing.web(scene, rng) for scene in scenes])
    captions = [drawing.careless_caption(scene, rng) for scene in scenes]
    if args.vae:
        sd = replace(fresh(args.seed), vae=weights.load(args.vae).vae)
    else:
        sd = stage("vae", lambda: make_vae(pictures, args.vae_steps, args.seed))
    latents = encode(sd, pictures)
    sd = stage("web", lambda: make_unet(sd, latents, captions, args.web_steps, 1e-3, args.seed + 1))

    captions, pictures, _ = zip(*drawing.curated_set())
    latents = encode(sd, to_tensor(pictures))
    stage("theta_0", lambda: make_unet(sd, latents, captions, args.sft_steps, 1e-3, args.seed + 2))
    return report


def fresh(seed: int) -> weights.StableDiffusion:
    """All four parts, with weights that nothing has been learned in yet."""
    with torch.random.fork_rng():  # modules draw their weights from the global generator, which is left as it was
        torch.manual_seed(seed)
        tokenizer = small_tokenizer()
        ids = {"bos_token_id": tokenizer.vocab[BOS], "eos_token_id": tokenizer.vocab[EOS]}
        text_encoder = TextEncoder(TEXT | {"vocab_size": len(tokenizer.vocab)} | ids, tokenizer)
        return weights.StableDiffusion(UNet(UNET), AutoencoderKL(VAE), text_encoder, Scheduler(SD_1["scheduler"]))


def make_vae(pictures: Tensor, steps: int, seed: int) -> tuple[weights.StableDiffusion, dict]:
    """`fresh` with the VAE trained; its scaling_factor makes latents of unit variance."""
    sd = fresh(seed)

    def losses(draw: torch.Generator) -> Iterator[Tensor]:
        while True:
            x = pictures[torch.randint(len(pictures), (16,), generator=draw)]
            mean, logvar = sd.vae.encode(x)
            z = mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=draw)
            kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
            yield F.mse_loss(sd.vae.decode(z), x) + KL_WEIGHT * kl

    loss = optimise([sd.vae], losses(torch.Generator().manual_seed(seed)), steps, 2e-3, "vae")
    mean, logvar = encode(sd, pictures[:4096])
    sd.vae.scaling_factor = float((mean.var() + logvar.exp().mean()).rsqrt())
    return sd, {"steps": steps, "loss": loss} | ceiling(sd)


def make_unet(sd, latents: tuple[Tensor, Tensor], captions: list[str], steps: int, lr: float, seed: int):
    """`sd` with UNet and text tower trained to predict the noise (equation 3.3), and its scores."""
    mean, logvar = latents
    alphas_cumprod = sd.scheduler.alphas_cumprod

    def losses(draw: torch.Generator) -> Iterator[Tensor]:
        while True:
            rows = torch.randint(len(mean), (64,), generator=draw)
            posterior, eps = torch.randn((2, len(rows), *mean.shape[1:]), generator=draw)
            x0 = (mean[rows] + (0.5 * logvar[rows]).exp() * posterior) * sd.vae.scaling_factor
            t = torch.randint(len(alphas_cumprod), (len(rows),), generator=draw)
            empty = torch.rand(len(rows), generator=draw) < PROMPT_DROPOUT
            context = sd.encode_prompts(["" if e else captions[row] for row, e in zip(rows, empty)])
            yield F.mse_loss(sd.unet(add_noise(x0, eps, alphas_cumprod[t]), t, context), eps)

    draw = torch.Generator().manual_seed(seed)
    loss = optimise([sd.unet, sd.text_encoder], losses(draw), steps, lr, f"{len(captions)} captions")
    return sd, {"steps": steps, "loss": loss} | scores(sd)


def optimise(networks: list[nn.Module], losses: Iterator[Tensor], steps: int, lr: float, name: str) -> float:
    """AdamW with 100 steps of warm-up and a cosine's fall to 0; the mean loss over the last tenth of the steps."""
    parameters = [parameter for network in networks for parameter in network.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, fused=True)
    last = []
    for step in tqdm(range(1, steps + 1), name, mininterval=10):
        loss = next(losses)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.param_groups[0]["lr"] = lr * min(1, step / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.step()
        optimizer.zero_grad()
        last = last[-math.ceil(steps / 10) + 1 :] + [loss.item()]
    return sum(last) / len(last)


@torch.no_grad()
def encode(sd, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """[N,3,32,32] in [-1,1] -> mean and log-variance, unscaled, [N,4,8,8] each."""
    means, logvars = zip(*(sd.vae.encode(batch) for batch in pictures.split(256)))
    return torch.cat(means), torch.cat(logvars)


@torch.no_grad()
def ceiling(sd) -> dict:
    """What the ideal pictures score once they have been through the VAE: what a UNet that has no other fault would."""
    scenes = toy.split()["validation"]
    mean, _ = encode(sd, to_tensor([toy.ideal(scene) for scene in scenes]))
    pictures = (sd.vae.decode(mean) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    return {"ceiling": average(toy.score(pictures, [scene.caption for scene in scenes]))}


def scores(sd) -> dict:
    """What pictures for the validation prompts score."""
    prompts = [scene.caption for scene in toy.split()["validation"]]
    generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    pictures = sampler.decode(sd, sampler.sample(sd, prompts, **SAMPLING, generators=generators))
    return average(toy.score(pictures.permute(0, 2, 3, 1).numpy(), prompts))


def average(metrics: dict[str, np.ndarray]) -> dict[str, float]:
    """Of `toy.score`'s [N] the means, to four decimals."""
    return {name: round(float(values.mean()), 4) for name, values in metrics.items()}


def to_tensor(pictures: list[np.ndarray]) -> Tensor:
    """Pictures [32,32,3] in [0,1] -> [N,3,32,32] in [-1,1]."""
    return torch.from_numpy(np.stack(pictures).astype(np.float32)).permute(0, 3, 1, 2).contiguous() * 2 - 1


def small_tokenizer() -> Tokenizer:
    """CLIP's byte-pair encoding with only those of its 48,894 merges that the captions' words need."""
    clip = Tokenizer()
    ranks, needed = {merge: rank for rank, merge in enumerate(clip.merges)}, set()
    for word in sorted({word for scene in toy.SCENES for word in scene.caption.split()}):
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            pairs = [f"{a} {b}" for a, b in zip(parts, parts[1:])]
            best = min(pairs, key=lambda pair: ranks.get(pair, math.inf))
            needed.add(best)
            at = pairs.index(best)
            parts[at : at + 2] = [best.replace(" ", "")]
    return Tokenizer(sorted(needed, key=ranks.__getitem__))


if __name__ == "__main__":
    sys.exit(run.script("pretrain", main))
