"""Options shared by the particle commands."""

import argparse


def add_picking(p: argparse.ArgumentParser) -> None:
    """Add the picking options."""
    p.add_argument(
        "--method",
        choices=("gaussian", "gev", "pvalue"),
        default="gaussian",
        help="how significance is judged (default: Gaussian noise)",
    )
    p.add_argument(
        "--false-positives",
        type=float,
        default=1.0,
        metavar="F",
        help="accepted in the whole map (default: 1)",
    )
    p.add_argument(
        "--cutoff",
        type=float,
        metavar="C",
        help="taken as it is, in the method's scale: z-score, or -ln p (default there: 8)",
    )
    p.add_argument(
        "--min-distance",
        type=float,
        default=5.0,
        metavar="PX",
        help="no two peaks are closer (default: 5)",
    )
    add_montage_picking(p)


def add_montage_picking(p: argparse.ArgumentParser) -> None:
    """Add the picking options for montages."""
    p.add_argument(
        "--per",
        choices=("exposure", "montage"),
        default="exposure",
        help="of a montage: a cutoff for every exposure, or one for all that is shown "
        "(default: exposure)",
    )
    p.add_argument(
        "--same-distance",
        type=float,
        metavar="PX",
        help="peaks of several exposures so near are one particle (default: --min-distance)",
    )
    p.add_argument(
        "--same-angle",
        type=float,
        default=10.0,
        metavar="DEGREES",
        help="... if their orientations differ by at most this (default: 10)",
    )
    p.add_argument(
        "--same-defocus",
        type=float,
        default=500.0,
        metavar="ANGSTROM",
        help="... and their defoci by at most this (default: 500)",
    )


def add_optics(p: argparse.ArgumentParser) -> None:
    """Add the optics options."""
    p.add_argument(
        "--optics", metavar="CONFIG.yaml", help="Leopard-EM's configuration of the search"
    )
    p.add_argument(
        "--template-box", type=int, metavar="N", help="edge of the template (default: its file's)"
    )
