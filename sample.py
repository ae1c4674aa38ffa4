"""Sample images from a Stable Diffusion checkpoint, for example one that train.py has made.

    python sample.py --model FOLDER --prompt "a red circle" --num-images 4

Writes one PNG per image, whose text chunk "parameters" records how it was made, and a grid if there
are several.
"""

import argparse
import sys
from os.path import expanduser
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from spin import toy
from spin.checkpoint import load_pipeline, save_single_file
from spin.config import TOY
from spin.eval import plots
from spin.infra.cli import (
    SEED_TYPE,
    number,
    run_script,
    utf8_text,
    warn_of_cut_prompts,
)
from spin.infra.devices import default_dtype, prepare_device
from spin.infra.images import save_png, to_pil
from spin.infra.prompts import read_prompts
from spin.infra.run import dtype_of_checkpoint
from spin.sampler import SAMPLERS, SamplingOptions, sample_images
from spin.scheduler import PREDICTION_TYPES
from spin.step import cast_weights_

GRID_ROWS = 20  # prompts in grid.png, at most


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Return the flags, with the sampler's usual number of steps filled in."""
    parser = argparse.ArgumentParser(
        description="Sample images from a checkpoint.", usage=argparse.SUPPRESS
    )
    parser.add_argument(
        "--model",
        type=expanduser,
        required=True,
        help="checkpoint folder in the diffusers layout, hub id, or original single file",
    )
    parser.add_argument(
        "--unet",
        type=expanduser,
        help="take the UNet from this checkpoint instead (default: the model's own)",
    )
    parser.add_argument(
        "--prediction-type",
        choices=PREDICTION_TYPES,
        help="what the UNet predicts (default: what the model's files say)",
    )
    parser.add_argument(
        "--save-single",
        type=expanduser,
        help="also write the model to this .safetensors file, in the original single-file layout",
    )
    parser.add_argument(
        "--prompt",
        type=utf8_text,
        action="append",
        default=[],
        help="what the images should show; can be given several times",
    )
    parser.add_argument(
        "--prompts",
        type=expanduser,
        help="file of prompts: .txt (one per line), .json, .jsonl (prompt, text or caption)",
    )
    parser.add_argument(
        "--negative-prompt",
        type=utf8_text,
        help='what guidance steers away from (default: no prompt, which for SDXL is not "")',
    )
    parser.add_argument(
        "--num-images", type=number(int, 1), default=1, help="images per prompt (default: 1)"
    )
    parser.add_argument(
        "--seed",
        type=SEED_TYPE,
        default=0,
        help="seed of each prompt's first image; each further image adds 1 (default: 0)",
    )
    parser.add_argument(
        "--steps",
        type=number(int, 1),
        help="sampling steps (default: the sampler's usual number)",
    )
    parser.add_argument(
        "--guidance",
        type=number(float, 0),
        default=7.5,
        help="scale; 1: no guidance, at half the cost; 0: only the negative prompt (default: 7.5)",
    )
    parser.add_argument(
        "--sampler",
        choices=list(SAMPLERS),
        default="ddim",
        help="ddpm: ancestral; dpm++: needs fewer steps (default: ddim)",
    )
    parser.add_argument(
        "--eta",
        type=number(float, 0, 1),
        default=0.0,
        help="DDIM noise as a fraction of DDPM's; 0: deterministic (default: 0)",
    )
    parser.add_argument(
        "--height", type=number(int, 1), help="pixels (default: what the UNet was trained at)"
    )
    parser.add_argument(
        "--width", type=number(int, 1), help="pixels (default: what the UNet was trained at)"
    )
    parser.add_argument(
        "--batch-size", type=number(int, 1), default=1, help="images sampled at once (default: 1)"
    )
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: %(default)s",
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="dtype of weights and computation (default: compute as in the run that trained the "
        "model, else in bfloat16 on CUDA and float32 on the CPU; --save-single in float32)",
    )
    parser.add_argument(
        "--out",
        type=expanduser,
        default="runs/samples",
        help="folder for the images (default: runs/samples)",
    )
    args = parser.parse_args(argv)

    args.steps = args.steps or SAMPLERS[args.sampler].steps
    if args.save_single and not args.save_single.endswith(".safetensors"):
        parser.error(f"--save-single {args.save_single}: the name must end in .safetensors")
    if args.eta > 0 and args.sampler != "ddim":
        parser.error(f"--eta: --sampler {args.sampler} does not use it")
    if not (args.prompt or args.prompts or args.save_single):
        parser.error("nothing to sample: give --prompt or --prompts")
    return args


def main(argv: list[str] | None = None) -> list[Path]:
    """Return the paths of the images, prompt by prompt."""
    args = parse_args(argv)
    prompts = list(args.prompt)
    if args.prompts:
        prompts += read_prompts(args.prompts)

    # ---- the model
    device = prepare_device(args.device)
    dtype = args.dtype or dtype_of_model(args.unet or args.model, device)
    # without --dtype: float32, in which --save-single writes; cast_weights_ rounds the UNet later
    weight_dtype = getattr(torch, args.dtype or "float32")
    pipe = load_pipeline(args.model, weight_dtype, device, args.unet, args.prediction_type)
    if args.save_single:
        save_single_file(pipe, args.save_single)
        print(f"the model is in {args.save_single}")
    if not prompts:
        return []
    all_prompts = [*prompts, args.negative_prompt or ""]
    warn_of_cut_prompts(pipe.text_encoder.tokenizer, all_prompts)

    # ---- an image for each prompt and seed
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    seeds = range(args.seed, args.seed + args.num_images)
    image_prompts = []
    for prompt in prompts:
        image_prompts += [prompt] * args.num_images
    image_seeds = list(seeds) * len(prompts)
    options = SamplingOptions(
        steps=args.steps,
        guidance=args.guidance,
        sampler=args.sampler,
        eta=args.eta,
        height=args.height,
        width=args.width,
        dtype=getattr(torch, dtype),
    )
    cast_weights_(pipe.unet, options.dtype)
    images = sample_images(
        pipe, image_prompts, image_seeds, options, args.batch_size, args.negative_prompt
    )
    bar = tqdm(images, "sampling", total=len(image_prompts), unit="image", delay=0.5)

    paths: list[Path] = []
    grid_images: list[Image.Image] = []
    for prompt, seed, tensor in zip(image_prompts, image_seeds, bar):
        image = to_pil(tensor)
        path = out / f"{len(paths):05d}.png"
        settings = {
            "Seed": seed,
            "Negative prompt": args.negative_prompt,
            "Steps": args.steps,
            "Sampler": args.sampler,
            "CFG scale": args.guidance,
            "Eta": args.eta,
            "Precision": dtype,
            "Model": "/".join(Path(args.unet or args.model).resolve().parts[-2:]),
        }
        save_png(image, path, prompt, settings)
        paths.append(path)
        if len(grid_images) < GRID_ROWS * args.num_images:
            grid_images.append(image)

    # ---- a grid: a row for each prompt, a column for each seed
    if len(grid_images) > 1:
        rows = []
        for start in range(0, len(grid_images), args.num_images):
            rows.append(grid_images[start : start + args.num_images])
        columns = [f"seed {seed}" for seed in seeds]
        save_png(plots.grid(rows, columns, prompts[:GRID_ROWS]), out / "grid.png")

    noun = "image" if len(paths) == 1 else "images"
    print(f"{len(paths)} {noun} in {args.out}")
    return paths


def dtype_of_model(source: str, device: str) -> str:
    """Return the dtype that a model computes in unless --dtype is given.

    It is that of the run which trained the model, so that the miniature world's base is sampled
    like the models that are trained from it.
    """
    if Path(source).resolve() == toy.BASE:
        return TOY["dtype"]
    return dtype_of_checkpoint(source) or default_dtype(device)


if __name__ == "__main__":
    memory_advice = "lower --batch-size, --height or --width"
    sys.exit(run_script("sample.py", main, "finished images are kept", memory_advice))
