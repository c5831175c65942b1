# SPDX-License-Identifier: Apache-2.0

"""`resad check`: how many later good photos would alarm."""

import math
import sys
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from anomalib_resad.commands.console import say
from anomalib_resad.deploy.inferencer import ResADInferencer
from anomalib_resad.deploy.messages import print_table, printable
from anomalib_resad.deploy.prediction import Prediction, scales_of, threshold_of
from anomalib_resad.deploy.results import Results
from anomalib_resad.enrollment.files import content_hash
from anomalib_resad.enrollment.photos import PhotoError, list_photos
from anomalib_resad.enrollment.quantiles import share_interval


def check(
    bundle: Path,
    product: str,
    photos: Path,
    banks: Path | None = None,
    output: Path | None = None,
    add: bool = False,
) -> None:
    """Count which good photos, taken later than those that were enrolled, would alarm.

    Photos of one session mislead: they are more alike than those of next week. Photos that are enrolled are left out,
    and identical ones count once. Files that cannot be read are reported; the command then ends with status 1.

    Args:
        bundle: Folder made by `resad export`, or file made by `resad bundle pack`.
        product: What the photos show.
        photos: Folder of good photos, or one photo.
        banks: Folder of the products' banks, if not in the bundle.
        output: Folder for a map over each photo and a table, as `resad predict` writes them.
        add: Add the photos that alarm to the product.
    """
    inferencer = ResADInferencer(bundle, banks=banks)
    bank, root = inferencer.bank(product), photos if photos.is_dir() else photos.parent
    (limit, *_), _ = scales_of(inferencer.manifest, bank)
    if math.isnan(limit):
        msg = f"{product!r} has no threshold that a photo could exceed. Set one: resad threshold --rate 0.05"
        raise ValueError(msg)
    named = {path.relative_to(root).as_posix(): path for path in list_photos(photos)}
    new, enrolled = _not_enrolled(named, {each.sha256 for each in bank.references})
    found, problems = _inspected(inferencer, product, new, output)
    if not found and not problems:
        msg = f"All {len(named)} photos in {photos} are enrolled already. Check on good photos that were taken later."
        raise ValueError(msg)
    found = _judged(found)
    alarms = {name: each for name, each in found.items() if each.label}
    say(f"{product}: {threshold_of(inferencer.manifest, bank)}.")
    if found:
        low, high = (f"{100 * each:.2g}" for each in share_interval(len(alarms), len(found)))
        say(
            f"{len(alarms)} of {len(found)} good photos would alarm; with 95 % confidence between {low} and {high} % "
            "of such photos."
        )
    if enrolled:
        say(f"{enrolled} photos were left out, since they are enrolled, or there twice.")
    _tell(alarms)
    if alarms and add:
        grown = inferencer.add(product, [new[name] for name in alarms])
        say(f"They were added: {len(grown.references)} photos, {threshold_of(inferencer.manifest, grown)}.")
        say("Check again on other photos: these would no longer alarm in any case.")
    elif alarms:
        say("If they are good, add them with --add, so that such photos no longer alarm.")
    for problem in problems:
        say(problem)
    if problems:
        sys.exit(1)


def _not_enrolled(named: dict[str, Path], enrolled: set[str]) -> tuple[dict[str, Path], int]:
    """Photos that are neither enrolled nor there before, and how many are."""
    seen, new = set(enrolled), {}
    for name, path in named.items():
        try:
            content = content_hash(path)
        except OSError:
            content = name  # inspecting it says what is wrong
        if content not in seen:
            new[name] = path
        seen.add(content)
    return new, len(named) - len(new)


def _inspected(
    inferencer: ResADInferencer, product: str, photos: dict[str, Path], output: Path | None
) -> tuple[dict[str, Prediction], list[str]]:
    """What is found in each photo, and what to tell of those that were not inspected."""
    found: dict[str, Prediction] = {}
    problems = []
    with ExitStack() as stack:
        results = stack.enter_context(Results(output)) if output is not None else None
        for name, path in track(photos.items(), description="Checking", console=Console(stderr=True)):
            try:
                found[name], pixels = inferencer.inspect(path, product)
            except PhotoError as error:
                problems.append(f"not inspected: {error}")
                if results is not None:
                    results.fail(name, str(error))
                continue
            if results is not None:
                results.add(name, found[name], found[name].picture(pixels))
    return found, problems


def _judged(found: dict[str, Prediction]) -> dict[str, Prediction]:
    """What was judged; says what was not."""
    moved = [name for name, each in found.items() if each.moved]
    if moved:
        say(f"{len(moved)} photos were not judged, since their content has moved: {', '.join(moved)}.")
    return {name: each for name, each in found.items() if not each.moved}


def _tell(alarms: dict[str, Prediction]) -> None:
    """Which photos alarm, the highest score first."""
    if not alarms:
        return
    table = Table("photo", "score", "raw score")
    for name, found in sorted(alarms.items(), key=lambda pair: -pair[1].raw_score):
        table.add_row(escape(printable(name)), f"{found.score:.3f}", f"{found.raw_score:.4g}")
    print_table(table)
