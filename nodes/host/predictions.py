"""One call for predictions within a step: which see the references, and the one without that makes the third term."""

import logging
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ...dreamcache_core.method.guidance import fold_guidance
from .gates import added_copy, can_tell_rows, mark, sees_reference
from .run import RunStore, Step

logger = logging.getLogger(__name__)


class Predictions:
    """What ComfyUI's ``calc_cond_batch`` is asked for, with references.

    Args:
        predict: That function, from lists of texts to a prediction for each; ``None`` stands for a list that is not asked for.
        store: The run's.
        step: The step under way; a reference acts in it.
        x: The latents of this call, (images, channels, height, width): those of the step or a part of them.
        model_options: Of this call.
    """

    def __init__(
        self,
        predict: Callable[[list[Any]], list[Tensor]],
        store: RunStore,
        step: Step,
        x: Tensor,
        model_options: dict[str, Any],
    ) -> None:
        self.predict, self.store, self.step = predict, store, step
        self.model_options = model_options
        self.window = model_options["transformer_options"].get("context_window")
        self.place = step.place_of(x, self.window)
        self.regions = store.region_conds(step, x, self.place)

    def of(self, conds: list[Any]) -> list[Tensor]:
        """Predict for lists of texts; a pair of text and negative is folded with the third term (METHOD.md section 5)."""
        step, scale = self.step, self.step.guidance.image_guidance_scale
        is_pair = len(conds) == 2 and step.needs_unconditional
        if is_pair and None not in conds:
            text, reference, plain = self._three(*map(self._marked, conds))
            folded = fold_guidance(plain, reference, text, image_guidance_scale=scale)
            step.offsets.setdefault(self.place, folded[1] - reference)
            return list(folded)
        negative_is_off = len(conds) == 2 and step.guidance.mode == "joint"
        lists = [
            self._marked(cond, not (negative_is_off and i == 1)) for i, cond in enumerate(conds)
        ]
        asked = [cond for cond in lists if cond is not None]
        if len(lists) > 2 or len(asked) != 1 or not sees_reference(asked[0]):
            return self.predict(lists)
        if is_pair and step.negative and not self._is_shift_known():
            _, reference, plain = self._three(None, self._marked(self._in_window(step.negative)))
            step.offsets[self.place] = (1 - scale) * (plain - reference)
        return [
            prediction if cond is None else self.store.shift_nested(step, prediction, self.place)
            for cond, prediction in zip(lists, self.predict(lists), strict=False)
        ]

    def _marked(self, cond: Any, is_on: bool = True) -> Any:
        return cond and [mark(item, is_on, self.regions) for item in cond]

    def _in_window(self, texts: Any) -> Any:
        # ComfyUI has cut the texts that it was given itself
        handler = self.model_options.get("context_handler")
        if not (self.place and handler):
            return texts
        return handler.get_resized_cond(texts, self.step.x, self.window)

    def _is_shift_known(self) -> bool:
        return self.place is None or bool(self.step.offsets.keys() & {(), self.place})

    def _three(self, text: Any, negative: Any) -> list[Tensor]:
        """Predict e_ct, e_c and e_u, in one call where no other node minds a third list."""
        store, unconditional = self.store, self.step.unconditional
        store.has_unconditional = True
        texts = self._in_window(unconditional) if unconditional else negative
        without = [added_copy(cond, self.regions) for cond in texts]
        lists = [text, negative, without]
        if not (store.asks_separately or can_tell_rows(self.model_options, lists)):
            predictions = self.predict(lists)
            if len(predictions) == len(lists):
                return predictions
            store.asks_separately = True
            logger.warning(
                "Another node answers fewer predictions than the three that image_guidance asks for. The one without the "
                "reference is asked for in a call of its own, which takes longer and gives the same image."
            )
        # first: a node that keeps something of the negative then keeps that of the negative with the reference
        prediction = self.predict([None, without])[-1]
        return [*self.predict([text, negative]), prediction]
