"""Pictures in: what a person gives (`given.py`), what the loop starts from (`start.py`), and what is made of both:

    controlled    the UNet, to which ControlNets add what a picture says (`control.py`)
    pasted        the picture itself where the mask is black (`paste.py`)
    extend        a larger canvas around a picture, and the mask of what is new
    inversion.py  has `sd.invert`: the noise from which a picture is drawn again
    from_enlarged what is drawn once more at several times the size (`hires.py`)

Img2img is SDEdit (Meng et al. 2021, arXiv:2108.01073); masks are blended in at each step as in RePaint and ldm
(Lugmayr et al. 2022, arXiv:2201.09865), and grey ones step by step (Levin & Fried 2023, arXiv:2306.00950).
"""

from .control import Control, control_arguments, control_size, controlled, controls_in, told_of_controls
from .given import Pictures, alpha_mask, extend, read_picture
from .hires import enlarged_size, from_enlarged
from .paste import pasted
from .start import Start, begin_from, beside

__all__ = [
    "Control",
    "Pictures",
    "Start",
    "alpha_mask",
    "begin_from",
    "beside",
    "control_arguments",
    "control_size",
    "controlled",
    "controls_in",
    "enlarged_size",
    "extend",
    "from_enlarged",
    "pasted",
    "read_picture",
    "told_of_controls",
]
