"""The solver `implicit`: Adams's predictor and corrector from level to level, one evaluation a step."""

import torch

from .adams import Adams, descending


def implicit(run, x: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """dx/dsigma = (x - x0) / sigma along the given levels by an implicit method whose corrector costs no evaluation.

    Adams-Bashforth 2 predicts, Adams-Moulton 3 corrects, with variable steps, in sigma and on the velocity; `Adams` has
    the formulas and their source. That the evaluation at the predicted place does for both is what UniPC showed for
    diffusion models (W. Zhao et al. 2023, arXiv 2302.04867). It interpolates x0 in log-SNR, where sigma 1 and 0 lie at
    infinity; in sigma they are places like others. Nothing is evaluated at the end: the last step is the predicted one.

    levels [steps + 1] must descend to 0 or above. Errors noted: of each step but the last.
    """
    places = descending(levels)
    adams = Adams(x, places[0])
    for level, after in zip(levels[:-1], places[1:], strict=True):
        error = adams.correct(run.velocity(adams.x, level))
        if error is not None:
            run.note(error)
        adams.predict(after)
    return adams.x
