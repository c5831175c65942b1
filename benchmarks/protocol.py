# SPDX-License-Identifier: Apache-2.0

"""The words of a leaderboard's report: what was measured and how, and what a reader must know."""

from pathlib import Path

import pandas as pd

from benchmarks.summary import MEAN, Board, without_folders
from benchmarks.tables import DASH, records

READING = (
    "Per cent: mean over the categories of the mean over the draws of the reference photos; ± is the standard "
    "deviation, over the draws, of the mean over the categories. Incomplete methods stand last; their means are over "
    "the categories that they have finished, so they do not compare with the others."
)
PAIRING = (
    "Percentage points, on the same category, number of shots and draw, hence the same reference photos; only cells "
    "that both methods have count. Brackets: 95 % t interval over the categories. Categories, not draws, are the "
    "independent units: draws of one category share its test photos, so they are averaged first. There is no interval "
    "for a single category."
)
PUBLISHING = (
    "Copied from papers and README files, NOT measured here, and in no mean of this page. Backbones, resolutions, "
    "reference photos and training data differ from those above and from each other; see the columns. A missing "
    "figure was not published, or not found."
)
DISTURBING = (
    "Test photos are disturbed after enrollment from undisturbed references; all values of a method and condition are "
    "over the same categories and draws. Where references are defective, they were taken out of the test photos, so "
    "those tests have a few photos fewer than the clean one."
)


SCORES = (
    "Raw: what a method itself gives for a photo or a pixel, before any threshold or normalization. They rank the "
    "photos of one category; their sizes differ between methods and mean nothing across them."
)
COST = (
    "Time of one photo as a multiple of the backbone's alone, both measured in turn in the same cell; enrollment by "
    "the clock; bank: what is kept for each product, a network where enrollment trains one; peak: memory needed "
    "besides. Medians over the cells, 1 MB = 1,000,000 bytes."
)


def protocol(board: Board) -> dict[str, str]:
    """What was measured, and how, from the settings: terms and what they were."""
    settings = board.settings
    source = settings.get("source")
    trained_on = ", ".join(source) if isinstance(source, list) else "all targets but the tested one"
    also = settings.get("also") or []
    trained_on += f" and {plural(len(also), 'product')} beside them ({also[0]} to {also[-1]})" if also else ""
    size = " x ".join(str(side) for side in settings.get("image_size") or [DASH])
    last = len(board.draws) - 1
    machine = [str(settings[key]) for key in ("device", "cpu") if settings.get(key)]
    machine += [f"{settings['threads']} threads"] if settings.get("threads") else []
    machine += [f"{package} {version}" for package, version in (settings.get("versions") or {}).items()]
    terms = {
        "Targets": f"{board.dataset}, {plural(len(board.categories), 'category')}: {', '.join(board.categories)}.",
        "Training": (
            f"Methods that need labeled products were trained on {trained_on} (seed {settings.get('seed')}). "
            "Of a target, methods see only the reference photos."
        ),
        "References": (
            f"{numbers(board.shots)} good photos of the train split, {plural(len(board.draws), 'draw')} "
            f"({f'seeds 0 to {last}' if last else 'seed 0'}). All methods get the same photos; results.csv names them."
        ),
        "Backbone": (
            f"{settings.get('backbone')} ({Path(str(settings.get('weights'))).name}), {size} px, for all methods "
            "that let it be chosen."
        ),
        "Scores": SCORES,
        "Pixel metrics": "Over the categories that have masks; AUPRO up to a false-positive rate of 30 %.",
        "Cost": COST,
        "Machine": f"{', '.join(machine)}.",
    }
    if settings.get("command"):
        terms["Command"] = without_folders(str(settings["command"]))
    return terms


def plural(count: int, what: str) -> str:
    """A number of things."""
    several = what[:-1] + "ies" if what.endswith("y") else what + "s"
    return f"{count} {what if count == 1 else several}"


def numbers(counts: list[int]) -> str:
    """1, 2 or 4."""
    texts = [str(count) for count in counts]
    return " or ".join([", ".join(texts[:-1]), texts[-1]]) if len(texts) > 1 else texts[0]


def warnings(board: Board, summary: pd.DataFrame) -> list[str]:
    """What a reader must know before the figures."""
    marks = []
    for method in board.methods:
        rows = records(summary, category=MEAN, method=method)
        cells, expected = (sum(row[key] for row in rows) for key in ("cells", "expected_cells"))
        marks += [f"{method} {cells} of {expected} cells"] if cells < expected else []
    found = [f"Incomplete: {', '.join(marks)}."] if marks else []
    beyond = len(board.everything) - len(board.cells)
    if beyond:
        found.append(
            f"Left out here, since the settings have changed: {plural(beyond, 'cell')}, which results.csv has."
        )
    for metric, why in (
        (
            "image_AUROC",
            "No image metrics, and in no mean of them, since only good or only defective photos are tested",
        ),
        ("pixel_AUROC", "No pixel metrics, and in no mean of them, since there are no masks of defects"),
    ):
        tested = {category: board.finished(category=category)[metric] for category in board.categories}
        without = [category for category, values in tested.items() if len(values) and values.isna().all()]
        found += [f"{why}: {', '.join(without)}."] if without else []
    return found


def extent(board: Board) -> str:
    """How much was measured, in one line."""
    failed = int((board.cells["status"] != "ok").sum())
    return (
        f"{plural(len(board.methods), 'method')}, {plural(len(board.categories), 'category')}, "
        f"{numbers(board.shots)} reference photos, {plural(len(board.draws), 'draw')}; "
        f"{plural(len(board.cells) - failed, 'finished cell')}, {failed} failed."
    )


def title(board: Board) -> str:
    """Heading of the report."""
    return f"Few-shot leaderboard: {board.dataset}, {board.settings.get('backbone')}"
