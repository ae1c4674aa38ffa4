"""Draws pictures from a Stable Diffusion checkpoint, the result of train.py among them.

    python sample.py --model FOLDER --prompt "a red circle" --num-images 4

Writes one PNG an image, with how it was made in its text chunk "parameters", and a grid when there is more than one.
"""

import argparse
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from spin import data, run, sampler, viz, weights
from spin.run import InputError

GRID_ROWS = 20  # prompts that grid.png shows at most


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Draw pictures from a checkpoint.", usage=argparse.SUPPRESS)
    add, whole = parser.add_argument, run.number(int, 1)
    add("--model", required=True, help="checkpoint folder in the diffusers layout, hub id, or original single file")
    add("--unet", help="take the UNet from this one instead (default: the model's own)")
    add("--save-single", help="also write the model to this .safetensors file, in the original single-file layout")
    add("--prompt", action="append", default=[], help="what to draw; may be given several times")
    add("--prompts", help="file of prompts: .txt (one a line), .json, .jsonl (prompt, text or caption)")
    add("--negative-prompt", default="", help="what guidance leads away from (default: the empty prompt)")
    add("--num-images", type=whole, default=1, help="images a prompt (default: 1)")
    add("--seed", type=run.SEED, default=0, help="seed of a prompt's first image; the next has the next (0)")
    add("--steps", type=whole, default=50, help="network evaluations an image (default: 50)")
    guidance = "guidance scale; 1: none, at half the cost; 0: the negative prompt alone (default: 7.5)"
    add("--guidance", type=run.number(float, 0), default=7.5, help=guidance)
    add("--sampler", choices=["ddim", "ddpm"], default="ddim", help="deterministic, or ancestral (default: ddim)")
    add("--eta", type=run.number(float, 0, 1), default=0.0, help="share of DDPM's noise in a DDIM step (default: 0)")
    add("--height", type=whole, help="pixels (default: what the UNet was trained at)")
    add("--width", type=whole, help="pixels (default: what the UNet was trained at)")
    add("--batch-size", type=whole, default=1, help="images drawn at once (default: 1)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="default: float32")
    add("--out", default="runs/samples", help="folder for the pictures (default: runs/samples)")
    args = parser.parse_args(argv)
    args.prompts = args.prompt + (data.read_prompts(args.prompts) if args.prompts else [])
    if not (args.prompts or args.save_single):
        parser.error("nothing to draw: give --prompt or --prompts")
    return args


def main(argv: list[str] | None = None) -> list[Path]:
    """Returns the paths of the pictures, prompt by prompt."""
    args = parse(argv)
    dtype = getattr(torch, args.dtype)
    sd = weights.load(args.model, dtype, run.usable(args.device), args.unet)
    if args.save_single:
        weights.save_single(sd, args.save_single)
    seeds = range(args.seed, args.seed + args.num_images)
    jobs = [(prompt, seed) for prompt in args.prompts for seed in seeds]

    Path(args.out).mkdir(parents=True, exist_ok=True)
    pictures, paths = [], []  # only those pictures are kept that the grid shows
    settings = {"Steps": args.steps, "Sampler": args.sampler, "CFG scale": args.guidance, "Eta": args.eta}
    settings["Model"] = "/".join(Path(args.unet or args.model).resolve().parts[-2:])  # iter3/checkpoint, say
    bar = tqdm(total=len(jobs), desc="drawing", unit="image", delay=0.5)
    for at in range(0, len(jobs), args.batch_size):
        batch = jobs[at : at + args.batch_size]
        generators = [torch.Generator("cpu").manual_seed(seed) for _, seed in batch]
        try:
            latents = sampler.sample(
                sd, [prompt for prompt, _ in batch], args.steps, args.guidance, args.eta, generators,
                negative_prompts=args.negative_prompt, height=args.height, width=args.width, sampler=args.sampler,
            )  # fmt: skip
        except ValueError as error:
            raise InputError(str(error)) from None
        for (prompt, seed), image in zip(batch, sampler.decode(sd, latents)):
            picture = viz.to_pil(image)
            paths.append(Path(args.out, f"{len(paths):05d}.png"))
            text = viz.parameters(prompt, args.negative_prompt, picture.size, {"Seed": seed, **settings})
            with run.whole(paths[-1]) as part:
                viz.save_png(picture, part, text)
            if len(pictures) < GRID_ROWS * args.num_images:
                pictures.append(picture)
            bar.update()
    bar.close()

    if len(pictures) > 1:
        rows = [pictures[at : at + args.num_images] for at in range(0, len(pictures), args.num_images)]
        columns = [f"seed {seed}" for seed in seeds]
        with run.whole(Path(args.out, "grid.png")) as part:
            viz.save_png(viz.grid(rows, columns, args.prompts[:GRID_ROWS]), part)
    print(f"{len(paths)} image{'s' if len(paths) > 1 else ''} in {args.out}")
    return paths


if __name__ == "__main__":
    sys.exit(run.script("sample.py", main))
