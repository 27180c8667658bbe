"""DreamBench from beginning to end, by one process or by several under ``accelerate launch``.

Source: METHOD.md section 8. A subject's score is the mean over its images, the overall score the mean over subjects.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ...errors import MissingPackageError
from ...files.whole_files import whole_file
from ...images.files import open_image
from ...pipeline.generate import make_folder
from ...processes import require_shared_folder
from ..image_metrics import check_model_folders
from .dataset import Candidate, Photo, Subject, all_items, find_candidates, read_subjects
from .images import generate_images
from .options import DreamBenchOptions
from .prompts import read_benchmark
from .results import Results, summarise, write_report, write_tables
from .scores import ScoreLog, current_scores, score_candidates

logger = logging.getLogger(__name__)

SETTINGS_FILE = "settings.json"
REPORT_FILE = "report.html"


def evaluate_dreambench(options: DreamBenchOptions, state: Any) -> Results | None:
    """Generate what is wanted and missing, judge what is not judged yet, and write tables and report.

    ``options.out`` then holds ``overall.csv``, ``subjects.csv``, ``images.csv``, ``report.html``, ``settings.json``, and
    the logs ``scores-*.jsonl`` that the next run goes on from.

    Args:
        options: What to do.
        state: accelerate's ``PartialState`` (or ``Accelerator``) of this process.

    Returns:
        The tables, on the main process; ``None`` on others.

    Raises:
        DreamCacheError: Bad input; the message says what and what to do.
        OSError: The disk is full; give the same command again once there is room.
    """
    _require_packages()
    check_model_folders(dino=options.dino, clip=options.clip)
    benchmark = read_benchmark(
        options.dataset,
        subjects=options.subject_list,
        object_prompts=options.object_prompts,
        live_prompts=options.live_prompts,
    )
    subjects = read_subjects(options.dataset, benchmark, options.subjects)
    out = Path(options.out)
    make_folder(out)
    require_shared_folder(out, state)
    has_bar = state.is_local_main_process
    if options.generate:
        items = all_items(subjects, options.images_per_prompt)
        with state.split_between_processes(items) as own:
            generate_images(options, own, device=state.device, has_bar=has_bar)
        state.wait_for_everyone()
    candidates = find_candidates(
        options.image_folder, benchmark, subjects, options.images_per_prompt
    )
    log = ScoreLog(out, state.process_index)
    models = {"dino": options.dino, "clip": options.clip}
    size = options.batch_size
    with state.split_between_processes(candidates) as own:
        score_candidates(own, log, **models, device=state.device, batch_size=size, has_bar=has_bar)
    state.wait_for_everyone()
    return _finish(options, subjects, candidates, log) if state.is_main_process else None


def _finish(
    options: DreamBenchOptions,
    subjects: Sequence[Subject],
    candidates: Sequence[Candidate],
    log: ScoreLog,
) -> Results:
    scores = current_scores(candidates, log, dino=options.dino, clip=options.clip)
    results = summarise(scores, subjects)
    out = Path(options.out)
    write_tables(out, results, scores)
    notes = _notes(options, subjects, candidates)
    for note in notes[1:]:
        logger.warning("%s", note)
    scored = list(zip(candidates, scores, strict=True))
    write_report(out / REPORT_FILE, results, scored, notes=notes, num_repeats=options.report_images)
    with whole_file(out / SETTINGS_FILE) as temporary:
        temporary.write_text(json.dumps(options.to_dict(), indent=2) + "\n", encoding="utf-8")
    return results


def _notes(
    options: DreamBenchOptions, subjects: Sequence[Subject], candidates: Sequence[Candidate]
) -> list[str]:
    """Say what the figures are, then what keeps them from being those of the whole protocol."""
    dino, clip = (Path(folder).resolve().name for folder in (options.dino, options.clip))
    notes = [
        f"Mean cosine similarities, higher is better. DINO: class tokens of {dino}, image and real images of the "
        f"subject. CLIP-I: the same with image embeddings of {clip}. CLIP-T: image and prompt with {clip}. A subject's "
        "score is the mean over its images, the overall score the mean over subjects. Masked: subjects cut out and put "
        "on white. The row 'real images' compares each real image with the subject's others."
    ]
    num_images = sum(candidate.prompt_number is not None for candidate in candidates)
    wanted = sum(len(subject.prompts) for subject in subjects) * options.images_per_prompt
    if num_images < wanted:
        notes.append(f"{num_images} of {wanted} images are there; the others do not count.")
    shown = {c.subject.name for c in candidates if c.prompt_number is not None}
    silent = [subject.name for subject in subjects if subject.name not in shown]
    if silent:
        notes.append(f"No images at all of: {', '.join(silent)}.")
    bare = [subject.name for subject in subjects if not _is_cut_out(subject.reference)]
    if bare:
        notes.append(
            f"{len(bare)} of {len(subjects)} references have no mask beside them ({', '.join(bare)}): images made from them "
            "may show their background."
        )
    return notes


def _is_cut_out(photo: Photo) -> bool:
    """Whether something tells where a photo's subject is: a mask, or transparency."""
    if photo.mask is not None:
        return True
    with open_image(photo.image, str(photo.image)) as image:
        return image.has_transparency_data


def _require_packages() -> None:
    """Refuse, before hours of work, what would fail after them."""
    missing = [name for name in ("jinja2", "scipy", "transformers") if find_spec(name) is None]
    if missing:
        raise MissingPackageError(
            f"Evaluation needs {', '.join(missing)}. Install the extra: pip install 'dreamcache[eval]'."
        )
