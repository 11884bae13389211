"""Numbers about merged maps: what to call significant."""

from statistics import NormalDist

from ocelot_em.errors import InvalidInputError


def gaussian_cutoff(
    valid_pixels: int, total_projections: int, false_positives: float = 1.0
) -> float:
    """z-score that noise alone exceeds a given number of times in a whole search.

    The Gaussian noise model of 2DTM: every cross-correlation of every pixel is an independent draw
    of a standard normal distribution, so that
    ``sqrt(2) * erfcinv(2 * false_positives / (valid_pixels * total_projections))`` is exceeded
    ``false_positives`` times (Rickgauer, Grigorieff & Denk 2017, eLife 6:e25648; as in cisTEM and
    Leopard-EM). Evaluated as the normal quantile, which is the same number.

    Parameters
    ----------
    valid_pixels
        Pixels that are looked at; in the overlap of exposures, every candidate counts.
    total_projections
        Cross-correlations per pixel.
    false_positives
        How many are accepted, over all pixels; below the number of cross-correlations.

    Returns
    -------
    float
        Dimensionless; 7.774 for 3585**2 pixels and 20.5 million projections.

    Raises
    ------
    InvalidInputError
        Naming every argument that is not positive, or too many false positives.
    """
    problems = [
        f"{name}: expected more than 0, got {value}"
        for name, value in (
            ("valid_pixels", valid_pixels),
            ("total_projections", total_projections),
            ("false_positives", false_positives),
        )
        if not value > 0
    ]
    correlations = valid_pixels * total_projections
    if not problems and not false_positives < correlations:
        problems.append(
            f"false_positives: expected less than the {correlations} cross-correlations, "
            f"got {false_positives}"
        )
    if problems:
        raise InvalidInputError(problems)
    return -NormalDist().inv_cdf(false_positives / correlations)
