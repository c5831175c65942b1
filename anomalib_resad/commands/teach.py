# SPDX-License-Identifier: Apache-2.0

"""`resad teach`: what a product learns from a defect that was missed."""

from pathlib import Path

from rich.console import Console

from anomalib_resad.commands.console import say
from anomalib_resad.deploy.inferencer import ResADInferencer
from anomalib_resad.deploy.teaching import in_words, read_box


def teach(
    bundle: Path,
    product: str,
    photo: Path | None = None,
    banks: Path | None = None,
    mask: Path | None = None,
    box: str | None = None,
    forget: bool = False,
) -> None:
    """Teach a product a defect that was missed: what looks like it scores higher. `resad undo` takes it back.

    Args:
        bundle: Folder made by `resad export`, or file made by `resad bundle pack`.
        product: The product.
        photo: A photo with the defect.
        banks: Folder of the products' banks, if not in the bundle.
        mask: Where the defect is: a mask of the photo's size, white there.
        box: The same as "x,y,width,height" in pixels of the photo. Without mask and box, the patches that differ most
            from the good photos are taken for the defect.
        forget: Forget all that the product was taught, instead.
    """
    inferencer = ResADInferencer(bundle, banks=banks)
    if forget:
        if photo is not None:
            msg = f"--forget forgets all that {product!r} was taught, and --photo {photo} teaches. Give one of them."
            raise ValueError(msg)
        count = len(inferencer.bank(product).taught)
        inferencer.forget(product)
        say(f"{product}: what it was taught of {count} photos is forgotten. `resad undo` brings it back.")
        return
    if photo is None:
        msg = "Give the photo of a defect that was missed (--photo), or --forget."
        raise ValueError(msg)
    chosen = read_box(box)
    before = inferencer.predict(photo, product)
    with Console(stderr=True).status("Teaching"):
        bank = inferencer.teach(product, photo, mask, chosen)
    after = inferencer.predict(photo, product)
    say(in_words(bank))
    say(f"{photo} scored {before.score:.3f}, and scores {after.score:.3f} now ({after.status or 'no threshold'}).")
    if mask is None and box is None:
        say("Where the defect is was guessed. To mark it, take this back (`resad undo`) and give --mask or --box.")
