# SPDX-License-Identifier: Apache-2.0

"""`resad threshold`: what a product is judged by: its threshold, and the least area of a region."""

from pathlib import Path

from anomalib_resad.commands.console import say
from anomalib_resad.deploy.inferencer import ResADInferencer
from anomalib_resad.deploy.prediction import threshold_of
from anomalib_resad.deploy.regions import check_min_area


def threshold(
    bundle: Path,
    product: str,
    banks: Path | None = None,
    rate: float | None = None,
    score: float | None = None,
    model: bool = False,
    min_area: int | None = None,
) -> None:
    """Show or change a product's threshold, and the least area of its regions. The threshold of its maps moves with it.

    Args:
        bundle: Folder made by `resad export`, or file made by `resad bundle pack`.
        product: The product.
        banks: Folder of the products' banks, if not in the bundle.
        rate: Share of good photos that may alarm, such as 0.01; computed from how the product's photos score against
            each other, and again when some are added or removed.
        score: Raw score above which a photo is anomalous.
        model: Go back to the model's threshold.
        min_area: Fewest pixels of a region that is found, of the photo; 0 for regions of any size.
    """
    if (rate is not None) + (score is not None) + model > 1:
        msg = f"--rate {rate}, --score {score} and --model {model} are several thresholds. Give one of them."
        raise ValueError(msg)
    check_min_area(min_area or 0)
    inferencer = ResADInferencer(bundle, banks=banks)
    if rate is not None:
        bank = inferencer.calibrate(product, rate)
    elif score is not None or model:
        bank = inferencer.set_threshold(product, score)
    else:
        bank = inferencer.bank(product)
    if min_area is not None:
        bank = inferencer.set_min_area(product, min_area)
    say(f"{product}: {threshold_of(inferencer.manifest, bank)}.")
    if bank.min_area:
        say(f"Regions of fewer than {bank.min_area} pixels are left out.")
    if bank.leave_one_out:
        listed = ", ".join(f"{each:.4g}" for each in sorted(bank.leave_one_out))
        say(f"Its {len(bank.leave_one_out)} photos score {listed} against each other.")
