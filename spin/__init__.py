"""Self-play fine-tuning of Stable Diffusion (SPIN-Diffusion, arXiv 2402.10210), from scratch.

Read in this order:

    loss.py        the objective, a pure function of four errors per image pair
    scheduler.py   the noise schedule and one step of each sampler
    step.py        one training step's loss: noise, two networks, errors, objective
    ../train.py    the self-play loop: generate -> train -> promote
    sampler.py     guided sampling, prompts in, latents out
    unet.py        the denoiser; blocks.py holds what it shares with vae.py
    vae.py         images <-> latents
    text.py        prompts -> context
    weights.py     checkpoints in and out, strictly
    original.py    the names and configs of single-file checkpoints
    data.py        captioned images, latents on disk, which sample is drawn when
    run.py         a run folder: whole-or-nothing files, lock, log, state to resume from
    viz.py         picture grids, line charts and interval charts
    stats.py       bootstrap intervals, paired differences, win rates
    report.py      results and the verdict on the paper's claims
    toy.py         the miniature world: scenes, pictures, an exact score
    pretrain.py    how its base checkpoint, toy_base/, was made

A module imports only from modules of a lower level (tests/test_imports.py):
scheduler, loss, blocks, toy, stats, viz, run, original < unet, vae, text, data, report < weights, sampler, step
< pretrain.
"""
