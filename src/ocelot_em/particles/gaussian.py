"""Significance cutoff of the Gaussian noise model."""

from statistics import NormalDist

from ocelot_em.errors import InvalidInputError


def gaussian_cutoff(
    valid_pixels: int, total_projections: int, false_positives: float = 1.0
) -> float:
    """Return the z-score that Gaussian noise exceeds a given number of times in a search.

    The Gaussian noise model of 2DTM treats every cross-correlation of every pixel as an independent
    standard normal draw, so ``false_positives`` of them exceed
    ``sqrt(2) * erfcinv(2 * false_positives / (valid_pixels * total_projections))``
    (Rickgauer, Grigorieff & Denk 2017, eLife 6:e25648; as in cisTEM and Leopard-EM). Computed as
    the equivalent normal quantile.

    Parameters
    ----------
    valid_pixels
        Number of searched pixels; in an overlap, a pixel counts once per exposure.
    total_projections
        Number of cross-correlations per pixel.
    false_positives
        Expected number of false positives over all pixels; below the number of cross-correlations.

    Returns
    -------
    float
        Cutoff, dimensionless; 7.774 for 3585**2 pixels and 20.5 million projections.

    Raises
    ------
    InvalidInputError
        If any argument is not positive, or ``false_positives`` is too large.

    Examples
    --------
    >>> from ocelot_em import gaussian_cutoff
    >>> round(gaussian_cutoff(3585**2, 20_500_000), 3)
    7.774
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
