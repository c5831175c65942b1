# SPDX-License-Identifier: Apache-2.0

"""More mutations: of thresholds, awkward files and numbers, full disks, features in files, and servers that many ask at
once.
"""

from tests.mutation_list import Mutation

AWKWARD = [
    Mutation("enrollment/thresholds.py", "maps are as high as scores", "own - offset", "own", "test_processors"),
    Mutation("plugin.py", "errors of loading processes show frames", "WORKERS.match(str(each))", "None",
             "test_commands"),
    Mutation("enrollment/decoding.py", "the largest value of a PPM does not count",
             "white = None if largest is None or", "white = None if largest or", "test_pixels"),
    Mutation("enrollment/decoding.py", "a PPM in text must end with a newline", 'content += b"\\n" if',
             'content += b"" if', "test_pixels"),
    Mutation("enrollment/checks.py", "text is compared with numbers", "isinstance(value, Real) and not", "not",
             "test_edge_safety test_edge_thresholds"),
    Mutation("enrollment/checks.py", "fractions are counts", "isinstance(value, Integral)", "isinstance(value, Real)",
             "test_edge_safety"),
    Mutation("enrollment/checks.py", "truth values are counts", "isinstance(value, Integral) and not isinstance(value, "
             "bool)", "isinstance(value, Integral)", "test_edge_safety"),
    Mutation("deploy/results.py", "predict takes the folder of watch", "if lines.exists() and not path.exists():",
             "if False:", "test_watch"),
    Mutation("deploy/journal.py", "watch takes the folder of predict", "if (folder / TABLE).exists():", "if False:",
             "test_watch"),
    Mutation("deploy/results.py", "two runs write to one folder", "            self._lock.acquire(timeout=0)\n", "",
             "test_edge_results"),
    Mutation("deploy/products.py", "a bundle without a threshold gives none",
             "self.manifest.spread is None and self.manifest.score.threshold is not None",
             "self.manifest.spread is None", "test_edge_thresholds"),
    Mutation("export/replacing.py", "what is no bundle is replaced",
             "if output.exists() and not (output / MANIFEST).is_file():", "if False:", "test_edge_replace"),
    Mutation("export/replacing.py", "folders of users are removed", '"model-" + 32 * "[0-9a-f]"', '"*"',
             "test_edge_replace"),
    Mutation("export/edge_bundle.py", "a full disk is told in the words of OpenVINO",
             'getattr(error, "strerror", None) or "the disk is full, or fails"', "str(error)", "test_edge_replace"),
    Mutation("deploy/guard.py", "requests have no limit together", "if not length or self._held + length <= most:",
             "if True:", "test_bodies"),
    Mutation("deploy/guard.py", "what was held is never let go", "self._held -= length", "pass", "test_bodies"),
    Mutation("deploy/guard.py", "a client that leaves is an error", "suppress(ClientDisconnect)", "suppress()",
             "test_uploads"),
    Mutation("deploy/uploads.py", "folders of killed servers stay", "                _remove(left)\n",
             "                pass\n", "test_uploads"),
    Mutation("deploy/uploads.py", "folders whose lock is gone are removed", "if _lock_of(left).exists():", "if True:",
             "test_uploads"),
    Mutation("deploy/bodies.py", "photos are written elsewhere", 'prefix="resad-", dir=parent', 'prefix="resad-"',
             "test_uploads"),
    Mutation("deploy/api.py", "photos of a request are judged apart", "sent.photo(), name, known)",
             "sent.photo(), name)", "test_api"),
    Mutation("training/picture_files.py", "files of other photos are taken", "content_hash(path), Path",
             "Path", "test_feature_files"),
    Mutation("training/picture_files.py", "files of other models are taken",
             "checksum(backbone.state_dict())", '""', "test_feature_files"),
    Mutation("training/picture_files.py", "files are not looked into", 'if content.get("name") != name:',
             "if not content:", "test_feature_files"),
]  # fmt: skip
