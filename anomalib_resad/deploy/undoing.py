# SPDX-License-Identifier: Apache-2.0

"""What was done to a product, and back."""

from anomalib_resad.deploy.bank import product_name
from anomalib_resad.deploy.history import Step
from anomalib_resad.deploy.products import Products


class Undoing(Products):
    """A bundle whose products can be made what they were.

    Arguments, attributes and errors are those of :class:`~anomalib_resad.deploy.inferencer.ResADInferencer`, which also
    inspects.
    """

    def history(self, name: str) -> list[Step]:
        """The last changes of a product, the oldest first; also of one that was removed.

        Raises:
            ValueError: If there never was such a product.
        """
        return self._store.steps(product_name(name))

    def undo(self, name: str, step: int | None = None) -> Step:
        """Make a product what it was before a step, the last one by default. This is a step, too, and can be undone.

        Raises:
            ValueError: If there is no such step, or the product is already what it was then.
            BankError: If what was kept cannot be used, for example as it is of another model.
        """
        name = product_name(name)
        self._store.steps(name)  # a name that nobody knows leaves no lock
        with self._store.changing(name):
            return self._store.undo(name, step)
