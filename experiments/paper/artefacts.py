"""All artefacts by name: which claim, and what makes it out of finished points."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from deltalab.store.record import Outcome
from experiments.paper import (
    alpha,
    bits,
    curves,
    expo,
    intensity,
    parts,
    predict,
    rules,
    safety,
    table1,
)
from experiments.paper.evidence import Documents
from experiments.paper.found import Found


@dataclass(frozen=True)
class Artefact:
    """A table or figure of the paper, or a study of ours, of the experiment of its name."""

    title: str
    claim: str
    find: Callable[[Sequence[Outcome], Documents | None], Found]
    kind: str = "artefact"


NEAR_POST = "Scores stay near the post-trained model's for small p and k, and k < 0 works too."
STATISTIC = (
    "The best multiple of the mean magnitude is near 1, and magnitudes drawn from a normal or a"
    " uniform distribution of that mean are on par with it."
)
ARTEFACTS = {
    "table1": Artefact(
        "Table 1: three ways to choose which deltas get k",
        "Chosen at random or by the sign of the delta the score is kept, chosen by the sign of"
        " delta times gradient it is destroyed.",
        table1.table,
    ),
    "fig1": Artefact("Fig. 1: DARE with k on three text tasks, LLaMA-3", NEAR_POST, curves.text),
    "fig2": Artefact(
        "Fig. 2: DARE with k on three vision tasks",
        "The accuracy is flat at the post-trained model's for every p and k.",
        curves.images,
    ),
    "fig3": Artefact(
        "Fig. 3: the term of every method",
        "DARE's term is small, BitDelta's and Twin's are above 0, that of TIES grows with the drop"
        " rate, drop-only's is larger than DARE's.",
        parts.terms,
    ),
    "fig4": Artefact(
        "Fig. 4: BitDelta with more magnitude bits",
        "Four magnitude bits reach or pass the post-trained score.",
        bits.blocks,
    ),
    "fig5": Artefact("Fig. 5: BitDelta's statistic on three text tasks", STATISTIC, bits.statistic),
    "fig6": Artefact(
        "Fig. 6: ExPO's term on the DPO loss",
        "The term falls below 0 as alpha grows, then rises above 0, within alpha = 0 ... .6.",
        expo.expo_term,
    ),
    "fig7": Artefact(
        "Fig. 7: interpolate or extrapolate, LLaMA-3",
        "Which direction gains depends on the task.",
        alpha.gains,
    ),
    "fig8": Artefact("Fig. 8: DARE with k on all text tasks, LLaMA-3", NEAR_POST, curves.text),
    "fig9": Artefact("Fig. 9: DARE with k on all text tasks, Mistral", NEAR_POST, curves.text),
    "fig10": Artefact("Fig. 10: DARE with k on all text tasks, Qwen2", NEAR_POST, curves.text),
    "fig11": Artefact(
        "Fig. 11: DARE with k on all vision tasks",
        "The accuracy is flat at the post-trained model's for every p and k.",
        curves.images,
    ),
    "fig12": Artefact("Fig. 12: BitDelta's statistic on all text tasks", STATISTIC, bits.statistic),
    "fig13": Artefact(
        "Fig. 13: interpolate or extrapolate, Mistral and Qwen2",
        "Which direction gains depends on the task and on the model.",
        alpha.gains,
    ),
    "intensity": Artefact(
        "Study: editing intensity",
        "Is what a random edit does a function of its intensity v alone, however it was made?",
        intensity.intensity,
        "study",
    ),
    "rules": Artefact(
        "Study: quadrature rules",
        "What does each rule's error cost in gradients, over all edits and pairs?",
        rules.rules,
        "study",
    ),
    "predict": Artefact(
        "Study: prediction from one pass",
        "How far does one pass at the post-trained model see?",
        predict.predict,
        "study",
    ),
    "safety": Artefact(
        "Study: edits that restore safety",
        "Safe Delta and IRR bring attack success down to the aligned model's and keep the task,"
        " where as many entries at random do not.",
        safety.safety,
    ),
}
