# SPDX-License-Identifier: Apache-2.0

"""`resad history` and `resad undo`: what was done to a product, and back."""

from pathlib import Path

from rich.markup import escape
from rich.table import Table

from anomalib_resad.commands.console import say
from anomalib_resad.deploy.history import KEPT
from anomalib_resad.deploy.inferencer import ResADInferencer
from anomalib_resad.deploy.messages import print_table
from anomalib_resad.deploy.prediction import threshold_of


def history(bundle: Path, product: str, banks: Path | None = None) -> None:
    """List the last changes of a product, also of one that was removed.

    Args:
        bundle: Folder made by `resad export`, or file made by `resad bundle pack`.
        product: The product.
        banks: Folder of the products' banks, if not in the bundle.
    """
    table = Table("step", "time (UTC)", "what", "photos", "own threshold")
    for step in ResADInferencer(bundle, banks=banks).history(product):
        table.add_row(*map(escape, step.row()))
    print_table(table)
    say(f"The last {KEPT} steps are kept. Undo the last one with `resad undo`, an earlier one with --step.")


def undo(bundle: Path, product: str, banks: Path | None = None, step: int | None = None) -> None:
    """Make a product what it was before a step. This is a step, too: undo it to have the change back.

    Args:
        bundle: Folder made by `resad export`, or file made by `resad bundle pack`.
        product: The product.
        banks: Folder of the products' banks, if not in the bundle.
        step: Number of the step, as `resad history` lists them; the last one by default. Later steps are undone with
            it.
    """
    inferencer = ResADInferencer(bundle, banks=banks)
    undone = inferencer.undo(product, step)
    say(f"{product} is what it was before step {undone.number} ({undone.what}).")
    if product not in inferencer.products:
        say(f"{product} is not enrolled now. `resad undo` brings it back.")
        return
    bank = inferencer.bank(product)
    say(f"{product}: {len(bank.references)} photos, {threshold_of(inferencer.manifest, bank)}.")
