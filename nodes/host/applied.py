"""What the Apply nodes have put on a MODEL: immutable, shared by its clones."""

from dataclasses import dataclass, replace

from comfy.model_patcher import ModelPatcher

from ...dreamcache_core import Guidance, ReferenceUse, StateError

KEY = "dreamcache"
"""Under which everything of ours lies on a MODEL, and the store of a run in its options."""

FORMER_DEFAULT = Guidance(0.4)
"""Stands in older workflows where nobody chose it."""


@dataclass(frozen=True, eq=False)
class AppliedUse:
    """One Apply node's reference.

    Attributes:
        use: The reference with its adapters, scale and region.
        patcher: ModelPatcher of the adapters, as the Apply node made it.
        start_percent: Progress from which on it acts, 0 to 1, inclusive.
        end_percent: Progress up to which it acts, 0 to 1, exclusive.
        node_id: Id of the Apply node; ``None`` where nodes are executed without a graph.
    """

    use: ReferenceUse
    patcher: ModelPatcher
    start_percent: float
    end_percent: float
    node_id: str | None = None


@dataclass(frozen=True, eq=False)
class Applied:
    """All references of a MODEL.

    Attributes:
        uses: In the order of their Apply nodes.
        guidance: Holds for all of them.
        node_id: Id of the Apply node that has set the guidance; ``None`` where nodes are executed without a graph.
    """

    uses: tuple[AppliedUse, ...]
    guidance: Guidance
    node_id: str | None = None

    @property
    def acting(self) -> "Applied":
        """The same without references that change nothing."""
        return replace(self, uses=tuple(u for u in self.uses if u.use.is_active))

    def after(self, before: "Applied") -> "Applied":
        """The same behind those of the Apply nodes before; guidance that nobody chose gives way to theirs."""
        uses = (*before.uses, *self.uses)
        was_chosen = replace(before.guidance, image_range=Guidance().image_range) != Guidance()
        if self.guidance == Guidance() or (was_chosen and self.guidance == FORMER_DEFAULT):
            return replace(before, uses=uses)
        guidance = replace(self.guidance, image_range=before.guidance.image_range)
        return replace(self, uses=uses, guidance=guidance)

    @property
    def patchers(self) -> list[ModelPatcher]:
        """The adapters' ModelPatchers, each once."""
        return list(dict.fromkeys(applied.patcher for applied in self.uses))


def applied_to(model: ModelPatcher) -> Applied | None:
    """What the Apply nodes before have put on a MODEL, or ``None``."""
    return model.attachments.get(KEY)


def require_applied(model: ModelPatcher, node: str) -> Applied:
    """What the Apply nodes before have put on a MODEL.

    Raises:
        StateError: Nothing; the message names the node that needs it.
    """
    applied = applied_to(model)
    if applied is None:
        raise StateError(
            f"{node} needs a model with a reference on it; this one has none. Connect the model output of Apply DreamCache."
        )
    return applied
