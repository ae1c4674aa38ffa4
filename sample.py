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


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Draw pictures from a Stable Diffusion checkpoint.",
        usage=argparse.SUPPRESS,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="checkpoint folder in the diffusers layout")
    parser.add_argument("--unet", help="take the UNet from this folder instead; omit to use the model's own")
    parser.add_argument("--prompt", action="append", default=[], help="what to draw; may be given several times")
    parser.add_argument("--prompts", help="file of prompts: .txt (one a line), .json, .jsonl (prompt, text or caption)")
    parser.add_argument("--negative-prompt", default="", help="what guidance leads away from")
    parser.add_argument("--num-images", type=int, default=1, help="images a prompt; the i-th of every prompt has seed --seed + i")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first image of every prompt")
    parser.add_argument("--steps", type=int, default=50, help="network evaluations an image")
    parser.add_argument("--guidance", type=float, default=7.5, help="classifier-free guidance scale; 1: none, half the cost")
    parser.add_argument("--sampler", choices=["ddim", "ddpm"], default="ddim", help="ddim: deterministic at --eta 0; ddpm: ancestral")
    parser.add_argument("--eta", type=float, default=0.0, help="share of DDPM's noise that DDIM adds in a step, 0 to 1")
    parser.add_argument("--height", type=int, help="pixels; omitted: what the UNet was trained at")
    parser.add_argument("--width", type=int, help="pixels; omitted: what the UNet was trained at")
    parser.add_argument("--batch-size", type=int, default=1, help="images drawn at once")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of weights and computation")
    parser.add_argument("--out", default="runs/samples", help="folder for the pictures")
    args = parser.parse_args(argv)
    args.prompts = args.prompt + (data.read_prompts(args.prompts) if args.prompts else [])
    if not args.prompts:
        parser.error("nothing to draw: give --prompt or --prompts")
    for name in ("num_images", "steps", "batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: must be at least 1")
    return args


def main(argv: list[str] | None = None) -> list[Path]:
    """Returns the paths of the pictures, prompt by prompt."""
    args = parse(argv)
    sd = weights.load(args.model, dtype=getattr(torch, args.dtype), device=args.device, unet=args.unet)
    seeds = range(args.seed, args.seed + args.num_images)
    jobs = [(prompt, seed) for prompt in args.prompts for seed in seeds]

    pictures, paths = [], []
    bar = tqdm(total=len(jobs), desc="drawing", unit="image")
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
            model = Path(args.model).resolve().name
            text = viz.parameters(prompt, args.negative_prompt, seed, args.steps, args.sampler, args.guidance, image.shape, model)
            paths.append(Path(args.out, f"{len(paths):05d}.png"))
            pictures.append(viz.to_pil(image))
            with run.whole_file(paths[-1]) as part:
                viz.save_png(pictures[-1], part, text)
            bar.update()
    bar.close()

    if len(pictures) > 1:
        rows = [pictures[at : at + args.num_images] for at in range(0, len(pictures), args.num_images)]
        columns = [f"seed {seed}" for seed in seeds]
        with run.whole_file(Path(args.out, "grid.png")) as part:
            viz.save_png(viz.grid(rows, columns, args.prompts), part)
    print(f"{len(pictures)} image{'s' if len(pictures) > 1 else ''} in {args.out}")
    return paths


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"sample.py: error: {error}", file=sys.stderr)
        sys.exit(2)
