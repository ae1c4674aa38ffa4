"""Draws pictures from a Stable Diffusion checkpoint, the result of train.py among them.

    python sample.py --model FOLDER --prompt "a red circle" --num-images 4

Writes one PNG an image, with how it was made in its text chunk "parameters", and a grid when there is more than one."""

import argparse
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from spin import data, sampler
from spin.infra import run
from spin.eval import plots as viz
from spin.checkpoint import pipeline as weights
from spin.sampler import SAMPLERS

GRID_ROWS = 20  # prompts that grid.png shows at most


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Draw pictures from a checkpoint.", usage=argparse.SUPPRESS)
    add, whole, from_0, share = parser.add_argument, run.number(int, 1), run.number(float, 0), run.number(float, 0, 1)
    add("--model", required=True, help="checkpoint folder in the diffusers layout, hub id, or original single file")
    add("--unet", help="take the UNet from this one instead (default: the model's own)")
    add("--save-single", help="also write the model to this .safetensors file, in the original single-file layout")
    add("--prompt", action="append", default=[], help="what to draw; may be given several times")
    add("--prompts", help="file of prompts: .txt (one a line), .json, .jsonl (prompt, text or caption)")
    add("--negative-prompt", default="", help="what guidance leads away from (default: the empty prompt)")
    add("--num-images", type=whole, default=1, help="images a prompt (default: 1)")
    add("--seed", type=run.SEED, default=0, help="seed of a prompt's first image; the next has the next (0)")
    add("--steps", type=whole, help="network evaluations an image (default: 50; with dpm++ 20)")
    add("--guidance", type=from_0, default=7.5, help="1: none, at half the cost; 0: only the negative prompt (7.5)")
    add("--sampler", choices=SAMPLERS, default="ddim", help="ddpm: ancestral; dpm++: needs fewer steps (default: ddim)")
    add("--eta", type=share, default=0.0, help="share of DDPM's noise in a DDIM step (default: 0)")
    add("--height", type=whole, help="pixels (default: what the UNet was trained at)")
    add("--width", type=whole, help="pixels (default: what the UNet was trained at)")
    add("--batch-size", type=whole, default=1, help="images drawn at once (default: 1)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="default: float32")
    add("--out", default="runs/samples", help="folder for the pictures (default: runs/samples)")
    args = parser.parse_args(argv)
    args.steps = args.steps or (20 if args.sampler == "dpm++" else 50)
    args.prompts = args.prompt + (data.read_prompts(args.prompts) if args.prompts else [])
    if args.save_single and not args.save_single.endswith(".safetensors"):
        parser.error(f"--save-single {args.save_single}: the name must end in .safetensors")
    if not (args.prompts or args.save_single):
        parser.error("nothing to draw: give --prompt or --prompts")
    return args


def main(argv: list[str] | None = None) -> list[Path]:
    """Returns the paths of the pictures, prompt by prompt."""
    args = parse(argv)
    sd = weights.load(args.model, getattr(torch, args.dtype), run.usable(args.device), args.unet)
    if args.save_single:
        weights.save_single(sd, args.save_single)
        print(f"the model is in {args.save_single}")
    seeds = range(args.seed, args.seed + args.num_images)
    jobs = [(prompt, seed) for prompt in args.prompts for seed in seeds]
    pictures, paths = [], [Path(args.out, f"{i:05d}.png") for i in range(len(jobs))]
    Path(args.out).mkdir(parents=True, exist_ok=True)
    settings = {"Steps": args.steps, "Sampler": args.sampler, "CFG scale": args.guidance, "Eta": args.eta}
    settings["Model"] = "/".join(Path(args.unet or args.model).resolve().parts[-2:])  # iter3/checkpoint, say
    drawn = sampler.pictures(
        sd, jobs, args.batch_size, steps=args.steps, guidance=args.guidance, eta=args.eta, sampler=args.sampler,
        negative_prompts=args.negative_prompt, height=args.height, width=args.width,
    )  # fmt: skip
    for (prompt, seed), path, image in zip(jobs, paths, tqdm(drawn, "drawing", len(jobs), unit="image", delay=0.5)):
        picture = viz.to_pil(image)
        viz.save_png(picture, path, prompt, {"Seed": seed, "Negative prompt": args.negative_prompt, **settings})
        if len(pictures) < GRID_ROWS * args.num_images:  # only those are kept that the grid shows
            pictures.append(picture)
    if len(pictures) > 1:
        rows = [pictures[at : at + args.num_images] for at in range(0, len(pictures), args.num_images)]
        columns = [f"seed {seed}" for seed in seeds]
        viz.save_png(viz.grid(rows, columns, args.prompts[:GRID_ROWS]), Path(args.out, "grid.png"))
    print(f"{len(paths)} image{'s' * (len(paths) != 1)} in {args.out}")
    return paths


if __name__ == "__main__":
    sys.exit(run.script("sample.py", main))
