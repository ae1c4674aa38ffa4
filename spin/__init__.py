"""Self-play fine-tuning of Stable Diffusion (SPIN-Diffusion, arXiv 2402.10210), from scratch.

The method, in the order to read it:

    loss.py         the objectives: two players' errors on two images -> one loss
    scheduler.py    adding noise, what a network is trained to predict, one step of each sampler
    step.py         one training step's loss: from latents through both networks to a scalar
    ../train.py     the self-play loop, and the optimizer loop
    pairs.py        encodes real images, generates the opponent's, loads batches of pairs
    sampler.py      guided sampling
    data.py         captioned images, and reproducible random draws
    config.py       the settings, and where each comes from

The networks: unet.py and vae.py, which share layers.py, and text.py.

Four folders can be skipped at first: checkpoint/ (formats), infra/ (plumbing), eval/ (judging) and
toy/ (the miniature world). A module imports only from levels below its own; tests/core has a test
with the list.
"""
