"""The solvers of k-diffusion, DPM-Solver++, UniPC, LCM and DDPM, as diffusers 0.42.1 has them.

Two families, by what x is:

    SigmaSolver   x = x_0 + sigma noise, as in k-diffusion     arXiv:2206.00364
        Euler, EulerAncestral, Heun, DPM2, DPM2Ancestral, LMS, DPMppSDE
    LambdaSolver  x = alpha x_0 + sigma noise, alpha^2 + sigma^2 = 1, integrated over lambda = log(alpha / sigma)
        DPMpp2M, DPMpp2MSDE                                    arXiv:2211.01095
        UniPC                                                  arXiv:2302.04867

and two that go from timestep to timestep: LCM (arXiv:2310.04378) and DDPM (arXiv:2006.11239, algorithm 2).

Coefficients are computed by float32 operations in diffusers' order, and kept as Python floats. The steps of Euler,
EulerAncestral, DPMpp2M and DPMpp2MSDE are computed in float32 where x is in half precision; where x is in float64,
they are computed in float64, which diffusers does not do.
"""

from ..schedule import Scheduler
from .log_snr import DPMpp2M, DPMpp2MSDE, UniPC
from .sigma import DPM2, LMS, DPM2Ancestral, DPMppSDE, Euler, EulerAncestral, Heun
from .timesteps import DDPM, LCM

SOLVERS: dict[str, type[Scheduler]] = {
    solver.name: solver
    for solver in (
        *(LMS, Euler, EulerAncestral, Heun, DPM2, DPM2Ancestral),
        *(DPMpp2M, DPMpp2MSDE, DPMppSDE, UniPC, LCM, DDPM),
    )
}
