"""train.py, sample.py and evaluate.py on a tiny SDXL: the loop does not know that it is one."""

import copy
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import CountingBackend, write_metadata
from PIL import Image
from torch import Tensor

import evaluate
import sample
import train
from spin.checkpoint import Pipeline, load_pipeline
from spin.data import CaptionedImages, batch_rows, sizes_of_square
from spin.infra.run import Run
from spin.infra.shards import LatentShards
from spin.pairs import PairLoader
from spin.step import spin_step
from spin.unet import PooledAndSizesEmbedding

UNET = "checkpoint/unet/diffusion_pytorch_model.safetensors"
LOG_2 = math.log(2)


@pytest.fixture(scope="module")
def pipe_xl(tinyxl_folder) -> Pipeline:
    return load_pipeline(tinyxl_folder).freeze()


@pytest.fixture(scope="module")
def flags_xl(flags, tinyxl_folder):
    """Return a function that returns the arguments of a short run on the tiny SDXL."""

    def make_flags(out: Path, more: str = "") -> list[str]:
        return flags(out, f"--model {tinyxl_folder} --prompt-dropout 0.3 --save-every 1 {more}")

    return make_flags


@pytest.fixture(scope="module")
def finished_xl(flags_xl, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    train.main(flags_xl(out))
    return out


def test_every_iteration_starts_at_log_2_to_the_bit(finished_xl):
    log = Run(finished_xl).read_log()
    assert [line["model"] for line in log] == ["spin-1"] * 3 + ["spin-2"] * 3
    for line in log:
        if line["step"] == 1:
            assert line["margin"] == line["delta_data"] == line["delta_gen"] == 0
            assert line["loss"] == pytest.approx(LOG_2, abs=1e-7)
        assert line["grad_norm"] > 0


def test_so_does_one_in_bfloat16_that_recomputes_activations(flags_xl, tmp_path):
    more = "--dtype bfloat16 --checkpoint-activations --iterations 1 --steps 1 --grid-prompts 0"
    train.main(flags_xl(tmp_path / "run", more))
    [line] = Run(tmp_path / "run").read_log()
    assert line["margin"] == line["delta_data"] == line["delta_gen"] == 0
    assert line["grad_norm"] > 0


def test_every_tensor_learns(finished_xl, tinyxl_folder):
    """So does the added embedding, though no layer of the loop knows of it."""
    before = load_pipeline(tinyxl_folder).unet.state_dict()
    after = load_pipeline(finished_xl / "iter2/checkpoint").unet.state_dict()
    assert {name for name in before if torch.equal(before[name], after[name])} == set()


def test_an_interrupted_run_ends_with_the_same_bits(finished_xl, flags_xl, tmp_path, monkeypatch):
    load = PairLoader.load

    def load_until(loader, iteration, step, start, end):
        if (iteration, step) == (2, 2):
            raise KeyboardInterrupt
        return load(loader, iteration, step, start, end)

    with monkeypatch.context() as patch:
        patch.setattr(PairLoader, "load", load_until)
        with pytest.raises(KeyboardInterrupt):
            train.main(flags_xl(tmp_path / "run"))
    train.main(flags_xl(tmp_path / "run"))
    for k in (1, 2):
        weights = (tmp_path / f"run/iter{k}" / UNET).read_bytes()
        assert weights == (finished_xl / f"iter{k}" / UNET).read_bytes()


def test_the_cache_keeps_the_sizes_of_every_row(finished_xl, image_folder):
    [cache] = (finished_xl / "cache").iterdir()
    sizes = LatentShards(cache, range(12)).read("sizes", range(4))
    # (64, 64), (96, 64), (70, 120) and (200, 150) are cut to squares and resized to 32 pixels
    assert sizes.tolist() == [
        [64, 64, 0, 0, 32, 32],
        [64, 96, 0, 8, 32, 32],
        [120, 70, 11, 0, 32, 32],
        [150, 200, 0, 5, 32, 32],
    ]


def test_so_does_the_cache_of_any_other_model(finished):
    [cache] = (finished / "cache").iterdir()
    assert LatentShards(cache, range(12)).read("sizes", [1]).tolist() == [[64, 96, 0, 8, 32, 32]]


def sizes_of_row(images: CaptionedImages, row: int) -> tuple[int, ...]:
    return tuple(sizes_of_square(images.whole_image(row), images.resolution))


def expected_context(pipe: Pipeline, images: CaptionedImages, rows: list[int], dropped) -> Tensor:
    prompts = [images.caption(row) for row in rows]
    prompts = [None if drop else prompt for prompt, drop in zip(prompts, dropped)]
    sizes = torch.tensor([sizes_of_row(images, row) for row in rows])
    return pipe.encode_prompts(prompts, sizes)


def test_pairs_are_conditioned_on_true_sizes_and_dropped_prompts_are_zeros(
    flags_xl, image_folder, tinyxl_folder, tmp_path, monkeypatch
):
    contexts = []

    def spying(policy, **arguments):
        contexts.append(arguments["context"])
        return spin_step(policy, **arguments)

    monkeypatch.setattr("spin.step.spin_step", spying)
    more = "--iterations 1 --steps 3 --grid-prompts 0 --micro-batch 4"
    train.main(flags_xl(tmp_path / "run", more))
    pipe = load_pipeline(tinyxl_folder).freeze()
    images = CaptionedImages(image_folder, 32)
    num_dropped = 0
    for step, context in enumerate(contexts, start=1):
        rows = batch_rows(11, 1, step, 4, 12)
        dropped = [not tokens.any() for tokens in context[:, :77]]
        num_dropped += sum(dropped)
        torch.testing.assert_close(context, expected_context(pipe, images, rows, dropped))
    assert 0 < num_dropped < 12


def test_the_opponents_images_are_conditioned_on_the_sizes_of_the_real_ones(
    flags_xl, image_folder, tmp_path, monkeypatch
):
    seen = []
    encode_prompts = Pipeline.encode_prompts

    def spying(pipe, prompts, sizes=None):
        if pipe.unet is not None:  # while it generates
            seen.extend(map(tuple, sizes.tolist()))
        return encode_prompts(pipe, prompts, sizes)

    monkeypatch.setattr(Pipeline, "encode_prompts", spying)
    train.main(flags_xl(tmp_path / "run", "--iterations 1 --steps 3 --grid-prompts 0"))
    images = CaptionedImages(image_folder, 32)
    assert set(seen) == {sizes_of_row(images, row) for row in range(12)}


def test_players_are_told_the_same_sizes_to_the_pixel_in_bfloat16(
    flags_xl, image_folder, tmp_path, monkeypatch
):
    """bfloat16 cannot hold 257: opponents would generate under other sizes than the loss names."""
    data = Path(shutil.copytree(image_folder, tmp_path / "images"))
    rows = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
    for i, row in enumerate(rows):
        row["file_name"] = f"{i}.png"
        Image.new("RGB", (333 + 2 * i, 257 + 2 * i)).save(data / row["file_name"])
    write_metadata(data, rows)
    told = {True: set(), False: set()}  # {while gradients are on: sizes}
    forward = PooledAndSizesEmbedding.forward

    def spying(embedding, row):
        sizes = row[:, embedding.pooled_channels :][:, : embedding.NUM_SIZES]
        told[torch.is_grad_enabled()].update(map(tuple, sizes.tolist()))
        return forward(embedding, row)

    monkeypatch.setattr(PooledAndSizesEmbedding, "forward", spying)
    more = f"--data {data} --dtype bfloat16 --iterations 1 --steps 3 --grid-prompts 0"
    train.main(flags_xl(tmp_path / "run", more))
    images = CaptionedImages(data, 32)
    expected = {sizes_of_row(images, row) for row in range(12)}
    assert told[True] == expected
    assert told[False] == expected  # opponents, generating and in the loss


def test_a_step_is_one_graph(pipe_xl):
    torch._dynamo.reset()
    backend = CountingBackend()
    generator = torch.Generator().manual_seed(0)
    names = ("x0_data", "x0_gen", "eps")
    batch = {name: torch.randn((2, 4, 8, 8), generator=generator) for name in names}
    batch["t"] = torch.tensor([20, 900])
    batch["context"] = pipe_xl.encode_prompts(["a red circle", None])
    batch["alphas_cumprod"] = pipe_xl.scheduler.alphas_cumprod
    policy = copy.deepcopy(pipe_xl.unet).requires_grad_(True)
    step = torch.compile(spin_step, backend=backend, fullgraph=True)
    loss, _ = step(policy, opponent=pipe_xl.unet, **batch, beta=2000.0)
    assert loss.item() == pytest.approx(LOG_2, abs=1e-6)
    assert backend.graphs == 1


def test_another_resolution_than_the_unets_is_said(flags_xl, tmp_path, capsys):
    train.main(flags_xl(tmp_path / "run", "--dry-run"))
    note = "note: the checkpoint is for images of 64 x 64 pixels (sample_size); --resolution is 32"
    assert note in capsys.readouterr().err


@pytest.fixture
def images_with_rejected(image_folder, tmp_path) -> Path:
    """The twelve images, each preferred to the next."""
    data = Path(shutil.copytree(image_folder, tmp_path / "images"))
    rows = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
    for row, next_row in zip(rows, rows[1:] + rows[:1]):
        row["rejected_file_name"] = next_row["file_name"]
    write_metadata(data, rows)
    return data


def test_all_losses_train_it(flags_xl, images_with_rejected, tmp_path):
    more = "--loss all --iterations 1 --steps 1 --grid-prompts 0"
    train.main([*flags_xl(tmp_path / "run", more), "--data", str(images_with_rejected)])
    log = Run(tmp_path / "run").read_log()
    assert [line["model"] for line in log] == ["spin-1", "bounded-1", "sft", "dpo"]
    for line in log:
        assert line["grad_norm"] > 0
        if line["model"] in ("spin-1", "dpo"):
            assert line["loss"] == pytest.approx(LOG_2, abs=1e-7)


def test_a_dry_run_estimates_it(flags_xl, tmp_path, capsys):
    train.main(flags_xl(tmp_path / "run", "--dry-run"))
    assert "in all, about" in capsys.readouterr().out


def test_a_trained_model_is_sampled(finished_xl, tmp_path):
    flags = "--prompt x --steps 2 --height 32 --width 40 --device cpu"
    common = ["--model", str(finished_xl / "iter2/checkpoint"), *flags.split()]
    images = []
    for name, more in (("zeros", []), ("empty", ["--negative-prompt", ""])):
        [path] = sample.main([*common, *more, "--out", str(tmp_path / name)])
        images.append(np.asarray(Image.open(path)))
    assert images[0].shape == (32, 40, 3)
    assert (images[0] != images[1]).any(), "no negative prompt is not the empty one"


def test_a_trained_model_is_compared_with_its_base(
    finished_xl, tinyxl_folder, scorers, small_scorers, tmp_path
):
    """Its UNet alone is enough, beside the base."""
    (tmp_path / "prompts.txt").write_text("a red circle\na cat on the moon\n")
    unet = finished_xl / "iter2/checkpoint/unet"
    flags = "--num-images 2 --steps 2 --resolution 64 --device cpu --metrics pickscore"
    paths = ["--prompts", str(tmp_path / "prompts.txt"), "--scorers", str(scorers)]
    results = evaluate.main(
        ["--models", f"base={tinyxl_folder}", f"trained={unet}", *flags.split(), *paths]
        + ["--out", str(tmp_path / "out")]
    )
    assert list(results["models"]) == ["base", "trained"]
    assert math.isfinite(results["models"]["trained"]["pickscore"]["mean"])
