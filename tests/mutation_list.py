# SPDX-License-Identifier: Apache-2.0

"""Small ways to break the package, each with the tests that should notice; see :mod:`tests.mutations`."""

from typing import NamedTuple


class Mutation(NamedTuple):
    """One piece of text that is replaced.

    Attributes:
        file: Below ``anomalib_resad``.
        what: What it breaks.
        old: Text that stands there once.
        new: What takes its place.
        tests: Test modules that should fail.
    """

    file: str
    what: str
    old: str
    new: str
    tests: str


MUTATIONS = [
    # -- method
    Mutation("method/head.py", "labels inverted", "labels.append(share[chosen] > 0)",
             "labels.append(share[chosen] == 0)", "test_fused"),
    Mutation("method/head.py", "signs of residuals count", "residuals.abs() * self.power", "residuals * self.power",
             "test_fused"),
    Mutation("method/head.py", "statistics with dropout", "        self.eval()\n        evidence",
             "        evidence", "test_fused"),
    Mutation("method/head.py", "references of the wrong rows", "rows.values[0][nearest])",
             "rows.values[0][nearest.flip(0)])", "test_fused"),
    Mutation("method/reference_bank.py", "later blocks never win", "nearer = block_best > best",
             "nearer = block_best < best", "test_reference_bank"),
    Mutation("method/reference_bank.py", "index within the block", "block_index + start", "block_index",
             "test_reference_bank"),
    Mutation("method/joined_levels.py", "levels not of unit length",
             "[_of_length(share, level) for level in places]", "list(places)", "test_fused"),
    Mutation("method/joined_levels.py", "least directions are learned", "vectors[:, -self.channels[1] :]",
             "vectors[:, : self.channels[1]]", "test_fused"),
    Mutation("method/self_similarity.py", "neighbors count as elsewhere", "min(height, width) // 14",
             "min(height, width) // 28", "test_fused"),
    Mutation("method/flow.py", "sign of the log-determinant", "log_p = log_det - 0.5", "log_p = -log_det - 0.5",
             "test_flow"),
    Mutation("method/flow.py", "rows and columns of positions swapped", "torch.cat((columns, rows), dim=2)",
             "torch.cat((rows, columns), dim=2)", "test_golden"),
    Mutation("method/loss.py", "margin on the wrong side", "abnormal > boundary - margin] - (boundary - margin)",
             "abnormal > boundary + margin] - (boundary + margin)", "test_losses_and_maps test_golden"),
    Mutation("method/residual_flow.py", "flow's loss reaches the constraintor", "[f.detach() for f in constrained]",
             "constrained", "test_training"),
    Mutation("method/residual_flow.py", "codes at test only",
             "        residuals = self.toward_codes(residuals)\n        constrained",
             "        constrained", "test_defects"),
    Mutation("method/residual_flow.py", "no warm-up", "warming_up=progress < self.warmup", "warming_up=False",
             "test_variants"),
    Mutation("method/residual_flow.py", "abnormal patches raise the ceiling", "log_p.detach()[mask == 0]",
             "log_p.detach()", "test_losses_and_maps test_defects"),
    Mutation("method/likelihood_maps.py", "no ceiling", "torch.exp(log_p - ceiling)", "torch.exp(log_p)",
             "test_golden"),
    Mutation("method/anomaly_map.py", "maximum instead of the most anomalous share",
             "patches.topk(most, dim=1).values.mean(dim=1)", "patches.amax(dim=1)", "test_fused"),
    Mutation("method/codebook.py", "the other share of the way", "torch.lerp(values, targets, strength)",
             "torch.lerp(targets, values, strength)", "test_golden test_codebook"),
    Mutation("method/constraintor.py", "random kernel", "        nn.init.dirac_(self.conv.weight)\n", "",
             "test_constraintor"),
    Mutation("method/distributed.py", "each process its own ceiling", "ReduceOp.MAX)", "ReduceOp.MIN)",
             "test_distributed"),
    Mutation("method/backbone.py", "batch norms of the backbone learn", "super().train(mode=False)",
             "super().train(mode=True)", "test_backbone"),
    Mutation("method/backbone_weights.py", "any file is taken", "if digest != package.sha256:", "if False:",
             "test_backbone_weights"),
    Mutation("method/backbone_weights.py", "all blocks widen their input",
             'if f"_blocks.{number}._expand_conv.weight" in state else PLAIN', "", "test_backbone_weights"),
    # -- training
    Mutation("training/source_references.py", "references of another image",
             "draws = [self._pools.draw(path,", "draws = [self._pools.draw(pictures[0][0],", "test_fused_training"),
    Mutation("training/source_references.py", "no seed of its own for each image",
             "self.seed, epoch, key_of(path))", "self.seed, epoch)", "test_fused_training"),
    Mutation("training/source_references.py", "keys of the features from before they were learned",
             "            self.cache.replace_keys(join.keys_of)", "            pass", "test_fused_training"),
    Mutation("training/source_references.py", "masks are lost",
             "[picture.mask.to(levels[0]) for", "[0 * picture.mask.to(levels[0]) for", "test_fused_training"),
    Mutation("training/source_references.py", "photos are read again",
             "            self._photos.kept.add(photo.path)", "            pass", "test_fused_training"),
    Mutation("training/reference_pools.py", "an image is its own reference", " if other != path]", "]",
             "test_defects test_fused_training"),
    Mutation("training/synthetic_defects.py", "the same photos are painted in every epoch",
             'seeded(seed, epoch, key_of(path), "defect")', 'seeded(seed, key_of(path), "defect")',
             "test_fused_training"),
    Mutation("training/optimizer.py", "learning rate times ten at the milestones", "gamma=0.1", "gamma=10.0",
             "test_fused_training"),
    Mutation("training/optimizer.py", "no weight decay", 'weight_decay=settings["weight_decay"]', "weight_decay=0.0",
             "test_fused_training"),
    Mutation("training/optimizer.py", "codes are decayed", '"weight_decay": 0.0', '"weight_decay": 1.0',
             "test_fused_training"),
    Mutation("training/epoch_seeds.py", "every epoch alike", "self._seed(trainer, trainer.current_epoch)",
             "self._seed(trainer, 0)", "test_distributed"),
    Mutation("lightning_model.py", "frozen statistics are averaged",
             "average_batch_norms(self.model.estimator.modules())", "average_batch_norms(self.model.modules())",
             "test_distributed"),
    Mutation("lightning_model.py", "learning rate never falls", "self.lr_schedulers().step()", "self.lr_schedulers()",
             "test_fused_training"),
    # -- enrollment
    Mutation("enrollment/calibration.py", "the mean counts as certain", "* (1 + 1 / len(values)))", ")",
             "test_calibration"),
    Mutation("enrollment/calibration.py", "spread over all categories", "(group - group.mean())",
             "(group - values.mean())", "test_calibration"),
    Mutation("enrollment/thresholds.py", "unknown range counts as 1", "width, 1.0), 2.0)", "width, 1.0), 1.0)",
             "test_processors"),
    Mutation("enrollment/thresholds.py", "map's threshold stays", "moved = map_threshold + own - threshold",
             "moved = map_threshold", "test_processors test_edge"),
    Mutation("enrollment/rotations.py", "never rotated", "ROTATED = 0.85", "ROTATED = 0.1", "test_enrollment"),
    Mutation("enrollment/rotations.py", "clockwise", ".rotate(degrees,", ".rotate(-degrees,", "test_enrollment"),
    Mutation("enrollment/photos.py", "order of names", "for digest in sorted(unique))", "for digest in unique)",
             "test_photos"),
    Mutation("enrollment/coreset.py", "nearest rows are kept", "chosen.append(int(nearest.argmax()))",
             "chosen.append(int(nearest.argmin()))", "test_enrollment test_edge"),
    Mutation("enrollment/draws.py", "drawn with replacement", "size=count, replace=False", "size=count, replace=True",
             "test_photos"),
    # -- data, checkpoints
    Mutation("data/cross_category.py", "a target may be trained on", "if target in sources:", "if False:",
             "test_datamodule"),
    Mutation("data/cross_category.py", "nothing is held out of few images", "max(least, int(", "max(0, int(",
             "test_datamodule"),
    Mutation("data/product_folder.py", "masks of other photos", "if path.stem == stem]",
             "if stem.startswith(path.stem[:1])]", "test_datamodule"),
    Mutation("checkpoint.py", "threshold of another estimator", ' if settings["estimator"] == made_with else {}', "",
             "test_fused_training test_calibration"),
    Mutation("checkpoint.py", "flows of 0.1.0 are lost", '"model.flows.": "model.estimator.flows.",\n', "\n",
             "test_versions"),
    Mutation("few_shot_references.py", "a product inherits a threshold", "        post_processor.forget_product()",
             "        pass", "test_calibration"),
    Mutation("few_shot_references.py", "rotations asked for later are not made",
             "            rotations_asked=rotations,\n", "", "test_enrollment"),
    # -- deploy
    Mutation("deploy/bank.py", "altered banks are accepted", "if _checksum(metadata, arrays) != checksum:", "if False:",
             "test_edge"),
    Mutation("deploy/bank.py", "banks of other models are accepted", "if bank.encoder != manifest.encoder:",
             "if False:", "test_edge"),
    Mutation("deploy/bank.py", "rows padded with zeros", "np.repeat(rows[:1], missing, axis=0)",
             "np.zeros_like(rows[:1]).repeat(missing, axis=0)", "test_edge"),
    Mutation("deploy/bank_store.py", "a changed bank is not noticed", " or self._loaded[name][0] != stat", "",
             "test_edge"),
    Mutation("deploy/prediction.py", "a product's threshold is ignored",
             "chosen = threshold if bank.threshold is None else own", "chosen = threshold", "test_edge"),
    Mutation("deploy/bundle.py", "altered bundles are accepted",
             "hashlib.sha256(contents[name]).hexdigest() != digest", "False", "test_edge"),
    # -- export
    Mutation("export/edge_bundle.py", "settings are left out of the name", '("backbone", "layers", *ARCHITECTURE)',
             '("backbone", "layers")', "test_edge"),
    Mutation("export/edge_bundle.py", "a product's threshold for all",
             "threshold, map_threshold = post.source_thresholds",
             "threshold, map_threshold = post.image_threshold, post.pixel_threshold", "test_edge"),
    Mutation("export/openvino_float32.py", "operations are not marked", "        _mark(new)\n", "", "test_export"),
    Mutation("export/anomalib_export.py", "everything may be quantized", "    if kind in (",
             "    if not kind and kind in (",
             "test_export"),
    Mutation("pre_processor.py", "no antialiasing in exports", "        and transform.antialias\n",
             "        and not transform.antialias\n", "test_processors"),
    Mutation("reference_rows.py", "a photo is scored against itself",
             "[torch.cat([*parts[:index], *parts[index + 1 :]]) for parts in split]",
             "[torch.cat([*parts]) for parts in split]", "test_calibration"),
    Mutation("post_processor.py", "scores are clamped", "normalize(preds, threshold, norm_min, norm_max, torch)",
             "normalize(preds, threshold, norm_min, norm_max, torch).clamp(0.2, 0.8)", "test_processors"),
]  # fmt: skip
