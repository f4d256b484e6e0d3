"""Why the latents of the built-in model are scaled to 0.3: what PNDM does with a model that makes no error.

    python examples/shapes/stiffness.py

The "picture" is one colour of eight, seen N times (a background is 200 latent pixels, a small object nine). The
best possible prediction is known: without a caption the posterior mean of the eight, with one its colour. Guidance
and PNDM with 30 steps start from noise; right is who ends nearest to the colour of the caption.
"""

import torch
from scenes import COLOURS

import sd


def share_right(guidance: float, spread: float, seen: int, steps: int = 30, trials: int = 1000) -> float:
    generator = torch.Generator().manual_seed(0)
    colours = torch.tensor(list(COLOURS.values()), dtype=torch.float64)
    colours = (colours - colours.mean(0)) / (colours - colours.mean(0)).std() * spread  # (8, 3)
    caption = torch.randint(len(colours), (trials,), generator=generator)
    scheduler = sd.PNDM(steps)
    abar = scheduler.schedule.alphas_cumprod.double()
    x = torch.randn(trials, 3, generator=generator, dtype=torch.float64) / seen**0.5  # the mean of N pixels
    state = scheduler.init_state()
    for i, t in enumerate(scheduler.timesteps):
        a = abar[int(t)]
        distance = (x[:, None] - a.sqrt() * colours).square().sum(-1)  # (trials, 8)
        without = torch.softmax(-distance * seen / (2 * (1 - a)), dim=1) @ colours
        guided = without + guidance * (colours[caption] - without)
        x, state = scheduler.step(i, (x - a.sqrt() * guided) / (1 - a).sqrt(), x, state)
    nearest = (x[:, None] - colours).square().sum(-1).argmin(1)
    return (nearest == caption).double().mean().item()


if __name__ == "__main__":
    print("share right; standard deviation of the latents down, times that the colour is seen across")
    for guidance in (4.0, 7.5):
        print(f"guidance {guidance}      " + "".join(f"{n:8}" for n in (200, 60, 9)))
        for spread in (1.0, 0.5, 0.3, 0.25):
            shares = "".join(f"{share_right(guidance, spread, n):8.1%}" for n in (200, 60, 9))
            print(f"{spread:16} {shares}")
