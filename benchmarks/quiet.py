# SPDX-License-Identifier: Apache-2.0

"""Leave out what libraries say and wait for that tells the user of a benchmark nothing."""

import logging
import re
import socket
import warnings

import huggingface_hub.constants

NOISE = re.compile(r"GPU|TPU|Tip:|`Trainer|ckpt_path is not provided|callbacks returned in|Seed set to")


def quiet_lightning() -> None:
    """Leave out messages about devices and tips."""
    warnings.filterwarnings("ignore")
    logging.getLogger("anomalib").setLevel(logging.ERROR)
    logging.getLogger("lightning.pytorch.callbacks").setLevel(logging.ERROR)
    for name in ("rank_zero", "seed"):
        for package in ("lightning_fabric.utilities", "lightning.pytorch.utilities", "lightning.fabric.utilities"):
            logging.getLogger(f"{package}.{name}").addFilter(lambda record: not NOISE.search(record.getMessage()))


def ask_cache_if_offline() -> None:
    """Without a network, let the model hub's client ask its cache only, instead of retrying for a minute."""
    try:
        socket.getaddrinfo("huggingface.co", 443)
    except OSError:
        huggingface_hub.constants.HF_HUB_OFFLINE = True
