"""Check a checkpoint with real weights, and print a report to paste into an issue.

    python tests/real_weights.py MODEL

The tests load Stable Diffusion with random weights only, since no published ones could be
downloaded where this project is written. This script loads MODEL, samples one image in float32 on
the CPU and, if diffusers and transformers are installed, compares it with the image that diffusers
samples from the same prompt, noise and number of DDIM steps. SD-1.5 needs about 8 GB of memory and,
on one core, half an hour; SDXL needs several times as much of both.
"""

import argparse
import platform
import shutil
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from os.path import expanduser
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from spin.checkpoint import Pipeline, load_pipeline, locate, save_pipeline  # noqa: E402
from spin.checkpoint.pipeline import open_checkpoint  # noqa: E402
from spin.infra.cli import number, provenance, run_script  # noqa: E402
from spin.infra.images import save_png, to_pil  # noqa: E402
from spin.sampler import decode_latents, default_size, draw_noise, sample  # noqa: E402
from spin.scheduler import PREDICTION_TYPES  # noqa: E402

PROMPT = "a photograph of an astronaut riding a horse"
SEED = 0
GUIDANCE = 7.5


@dataclass
class Outputs:
    """What an implementation computes from the prompt and the noise."""

    context: Tensor  # [2,77,D], or SDXL's [2,78,D], of the empty prompt and of the prompt
    prediction: Tensor  # [1,4,h,w], the UNet's at the noise and the first timestep
    image: Tensor  # [3,H,W] in [0,1]
    seconds: float  # that sampling and decoding took


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], usage=argparse.SUPPRESS)
    parser.add_argument(
        "model",
        type=expanduser,
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
        "--prompt", default=PROMPT, help="what the image should show (default: %(default)s)"
    )
    parser.add_argument(
        "--steps", type=number(int, 1), default=20, help="steps of DDIM (default: 20)"
    )
    parser.add_argument(
        "--out",
        type=expanduser,
        default="runs/real-weights",
        help="folder for the images (default: runs/real-weights)",
    )
    return parser.parse_args(argv)


@torch.no_grad()
def main(argv: list[str] | None = None) -> str:
    """Print the report. Return its last line, which begins with PASS, DIFFERS or NOT COMPARED."""
    args = parse_args(argv)
    out = Path(args.out)

    # ---- what is in the files, and what was made of it
    print_versions()
    print_parts(args.model, args.unet)
    pipe = load_pipeline(args.model, unet=args.unet, prediction_type=args.prediction_type).freeze()
    print_decisions(pipe)
    print(f"prompt: {args.prompt!r}, seed {SEED}, {args.steps} steps, guidance {GUIDANCE}")

    # ---- our image
    noise = draw_noise([seeded()], latent_shape(pipe), torch.device("cpu"))
    ours = compute_ours(pipe, args.prompt, args.steps, noise)
    save_png(to_pil(ours.image), out / "ours.png")
    brightness = ours.image.mean().item()
    print(f"our image: {out / 'ours.png'}, mean {brightness:.3f}, {ours.seconds:.0f} s")

    # ---- theirs
    theirs = load_theirs(args, pipe, out)
    if theirs is None:
        verdict = f"NOT COMPARED: is {out / 'ours.png'} an image of the prompt?"
        print(verdict)
        return verdict
    del pipe  # its memory is needed
    expected = compute_theirs(theirs, args.prompt, args.steps, noise, ours.context)
    save_png(to_pil(expected.image), out / "diffusers.png")
    print(f"diffusers' image: {out / 'diffusers.png'}, {expected.seconds:.0f} s")

    # ---- the comparison
    print_difference("context", ours.context, expected.context)
    print_difference("UNet's prediction", ours.prediction, expected.prediction)
    levels = np.abs(gray_levels(ours.image) - gray_levels(expected.image))
    print(f"image: largest difference {levels.max()}, mean {levels.mean():.4f} of 255 gray levels")
    if levels.max() <= 1:
        verdict = "PASS: the images of this project and of diffusers differ by at most one level"
    else:
        verdict = "DIFFERS: please report it, with all of the above"
    print(verdict)
    return verdict


# ---- What was loaded -----------------------------------------------------------------------------


def print_versions() -> None:
    origin = provenance()
    versions = origin["versions"]
    for package in ("diffusers", "transformers"):
        try:
            versions[package] = version(package)
        except ImportError:
            versions[package] = "not installed"
    print(f"commit {origin['commit']}")
    print(", ".join(f"{name} {versions[name]}" for name in versions))
    print(f"{platform.platform()}, {torch.get_num_threads()} threads")


def print_parts(model: str, unet: str | None) -> None:
    """Print how many tensors and parameters the files hold for each network, and their dtypes."""
    print(f"model: {model}")
    checkpoint = open_checkpoint(locate(model))
    sources = {"unet": checkpoint, "vae": checkpoint, "text_encoder": checkpoint}
    if checkpoint.has_two_text_encoders():
        sources["text_encoder_2"] = checkpoint
    if unet is not None:
        print(f"UNet: {unet}")
        sources["unet"] = open_checkpoint(locate(unet, parts=("unet",)))
    for part, source in sources.items():
        tensors = source.read_network(part).tensors.values()
        num_parameters = sum(tensor.numel() for tensor in tensors)
        dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})
        print(f"{part}: {len(tensors)} tensors, {num_parameters:,} parameters, {', '.join(dtypes)}")


def print_decisions(pipe: Pipeline) -> None:
    """Print what the files were understood to say."""
    scheduler = pipe.scheduler
    config = scheduler.config
    betas = [config.get(key, "?") for key in ("beta_schedule", "beta_start", "beta_end")]
    last = scheduler.alphas_cumprod[-1].item()
    zero_snr = "zero" if last == 0 else "not zero"
    print(f"prediction type: {scheduler.prediction_type}")
    print(f"betas: {betas[0]}, {betas[1]} to {betas[2]}, {scheduler.num_train_timesteps} timesteps")
    print(f"last signal-to-noise ratio: {zero_snr} (alpha_bar {last:.6f})")
    print(f"steps offset: {scheduler.steps_offset}")

    tokenizer = pipe.text_encoder.tokenizer
    pad_id = tokenizer.vocab[tokenizer.pad_token]
    print(f"pad token: {tokenizer.pad_token!r}, id {pad_id}; {tokenizer.length} tokens a prompt")
    height, width = default_size(pipe)
    print(f"size: {height} x {width} pixels, VAE's scaling factor {pipe.vae.scaling_factor}")


# ---- Our outputs, and those of diffusers ---------------------------------------------------------


def seeded() -> torch.Generator:
    return torch.Generator("cpu").manual_seed(SEED)


def latent_shape(pipe: Pipeline) -> tuple[int, int, int]:
    height, width = default_size(pipe)
    factor = pipe.vae.downscale
    return (pipe.unet.conv_in.in_channels, height // factor, width // factor)


def compute_ours(pipe: Pipeline, prompt: str, steps: int, noise: Tensor) -> Outputs:
    """Return this project's outputs.

    noise: [1,4,h,w], for the prediction alone. `sample` draws the same, from the same seed.
    """
    context = pipe.encode_prompts(["", prompt])
    t = pipe.scheduler.timesteps(steps)[0]
    prediction = pipe.unet(noise, t, context[1:])

    started = time.perf_counter()
    latents = sample(
        pipe, [prompt], steps, GUIDANCE, generators=[seeded()], negative_prompts=""
    )
    [image] = decode_latents(pipe, latents)
    return Outputs(context, prediction, image, time.perf_counter() - started)


def compute_theirs(theirs, prompt: str, steps: int, noise: Tensor, our_context: Tensor) -> Outputs:
    """Return the outputs of diffusers' pipeline `theirs`.

    noise:       [1,4,h,w], what both sample from
    our_context: the UNet's input, so that predictions differ by the UNet alone
    """
    height = noise.shape[2] * theirs.vae_scale_factor
    width = noise.shape[3] * theirs.vae_scale_factor
    encoded = theirs.encode_prompt(
        prompt,
        device="cpu",
        num_images_per_prompt=1,
        do_classifier_free_guidance=True,
        negative_prompt="",
    )
    context = torch.cat([encoded[1], encoded[0]])  # the negative prompt's first
    read_context = our_context
    added = None
    if len(encoded) == 4:  # SDXL: pooled text, too. In ours, it and the sizes are one more row
        pooled = torch.cat([encoded[3], encoded[2]])
        num_pooled = pooled.shape[1]
        sizes = torch.tensor([[height, width, 0, 0, height, width]] * 2)
        row = torch.zeros_like(context[:, :1])
        row[:, 0, :num_pooled] = pooled
        row[:, 0, num_pooled : num_pooled + 6] = sizes
        context = torch.cat([context, row], dim=1)
        read_context = our_context[:, :-1]
        added = {
            "text_embeds": our_context[1:, -1, :num_pooled],
            "time_ids": our_context[1:, -1, num_pooled : num_pooled + 6],
        }
    theirs.scheduler.set_timesteps(steps)
    t = theirs.scheduler.timesteps[0]
    prediction = theirs.unet(noise, t, read_context[1:], added_cond_kwargs=added).sample

    started = time.perf_counter()
    [image] = theirs(
        prompt,
        height=height,
        width=width,
        num_inference_steps=steps,
        guidance_scale=GUIDANCE,
        negative_prompt="",
        latents=noise,
        output_type="pt",
    ).images
    return Outputs(context, prediction, image, time.perf_counter() - started)


def load_theirs(args: argparse.Namespace, pipe: Pipeline, out: Path):
    """Return diffusers' pipeline of the same model, with DDIM, or None if it cannot be had.

    If diffusers does not read the model's files (it wants tokenizer/, and for a single file the
    network), or flags change the model, it reads a temporary copy that `save_pipeline` writes.
    """
    try:
        import diffusers  # nothing else in this project does
    except ImportError as error:
        print(f"diffusers: cannot be imported ({first_line(error)})")
        return None

    if args.unet is None and args.prediction_type is None:
        try:
            path = locate(args.model)
            theirs = from_pretrained(diffusers, path, pipe.reads_sizes)
            print("diffusers: loaded the same files")
            return theirs
        except Exception as error:  # a library of another's can fail in any way
            print(f"diffusers: does not load these files ({first_line(error)})")

    copy = out / "copy"
    try:
        save_pipeline(pipe, copy)
        theirs = from_pretrained(diffusers, copy, pipe.reads_sizes)
        print("diffusers: loaded what save_pipeline made of the files")
        return theirs
    except Exception as error:
        print(f"diffusers: does not load what save_pipeline wrote ({first_line(error)})")
        return None
    finally:
        shutil.rmtree(copy, ignore_errors=True)


def from_pretrained(diffusers, path: Path, is_xl: bool):
    """Return diffusers' pipeline in float32, with DDIM, which leaves finished images as they are."""
    if is_xl:
        pipeline = diffusers.StableDiffusionXLPipeline
        options = {"add_watermarker": False}
    else:
        pipeline = diffusers.StableDiffusionPipeline
        options = {"safety_checker": None}
    load = pipeline.from_single_file if path.is_file() else pipeline.from_pretrained
    theirs = load(path, torch_dtype=torch.float32, **options)
    theirs.scheduler = diffusers.DDIMScheduler.from_config(
        theirs.scheduler.config, clip_sample=False, timestep_spacing="leading"
    )
    theirs.set_progress_bar_config(disable=True)
    return theirs


# ---- Differences ---------------------------------------------------------------------------------


def print_difference(name: str, ours: Tensor, theirs: Tensor) -> None:
    difference = (ours - theirs).abs()
    print(
        f"{name}: largest difference {difference.max():.2g}, mean {difference.mean():.2g}, "
        f"where the standard deviation is {theirs.std():.2g}"
    )


def gray_levels(image: Tensor) -> np.ndarray:
    """Return an image [3,H,W] in [0,1] as its file holds it: [H,W,3], 0 to 255."""
    return np.asarray(to_pil(image)).astype(int)


def first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]


if __name__ == "__main__":
    sys.exit(run_script("real_weights.py", main, "nothing is kept"))
