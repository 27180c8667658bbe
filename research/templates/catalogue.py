"""All shipped workflows."""

from collections.abc import Callable, Iterable

from . import masked, more, regions, scenes, series, start
from .workflow import Workflow

TEMPLATES: Iterable[Callable[[], Workflow]] = (
    start.quickstart,
    start.without_file,
    start.your_photo_sd15,
    start.your_photo_sdxl,
    start.step_by_step,
    masked.background_removed,
    masked.subject_by_word,
    regions.two_subjects,
    regions.two_subjects_demo,
    scenes.inpainting,
    scenes.inpainting_demo,
    scenes.image_to_image,
    scenes.image_to_image_demo,
    more.save_once,
    more.attention_map,
    series.guidance_grid,
    more.several_images,
    more.several_views_demo,
    more.with_lora,
    more.with_controlnet,
    series.folder_of_subjects,
    series.many_subjects_demo,
    series.train_your_own,
    series.train_demo,
)
