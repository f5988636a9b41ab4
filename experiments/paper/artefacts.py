"""All artefacts by name: which claim, and what makes it out of finished points."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from deltalab.store.record import Outcome
from experiments.atlas.study import atlas
from experiments.compression.study import compression
from experiments.merging import study
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
    saturation,
    scores,
    table1,
)
from experiments.paper.evidence import Documents
from experiments.paper.found import Found
from experiments.regime.study import regime
from experiments.sotu.study import sotu
from experiments.visionfuse.study import visionfuse


@dataclass(frozen=True)
class Artefact:
    """A table or figure of the paper, or a study of ours, of the experiment of its name.

    Attributes:
        folder: of the results, where its card lies.
        lighter: leaves out of a point what is not committed.
        documents: the ends of what is committed of single documents, beside the points.
        original: whose part embedded models take, beside those of the scale's roles.
        paper_scale: whether the experiment has models of that scale.
        sources: the artefacts whose committed points it looks at; empty: it has its own.
    """

    title: str
    claim: str
    find: Callable[[Sequence[Outcome], Documents | None], Found]
    kind: str = "artefact"
    folder: str = "paper"
    lighter: Callable[[Outcome], Outcome] = lambda point: point
    documents: tuple[str, ...] = ()
    original: str = "CLIP ViT-B/32"
    paper_scale: bool = True
    sources: tuple[str, ...] = ()


def without_experts(point: Outcome) -> Outcome:
    """Return a point without what it holds of its experts one by one."""
    return replace(point, experts={})


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
    "regime": Artefact(
        "Study: the size of the delta",
        "For which size of delta does an edit keep the model, and what one number tells its cost?",
        regime,
        "study",
        folder="regime",
        documents=("objective/change",),
        paper_scale=False,
    ),
    "saturation": Artefact(
        "Study: magnitude bits until nothing is left to gain",
        "From how many bits on is the loss flat, and does the error fall as theory says?",
        saturation.saturation,
        "study",
        documents=("objective/change",),
    ),
    "scores": Artefact(
        "Study: from the loss to the score",
        "Does the loss change, and the term that tells it, order what edits cost in score?",
        scores.scores,
        "study",
        sources=(
            "table1",
            "fig3",
            "fig4",
            "fig7",
            "fig8",
            "fig9",
            "fig10",
            "fig11",
            "fig12",
            "fig13",
            "intensity",
        ),
    ),
    "merging": Artefact(
        "Merging: all merges on two families of experts",
        "On experts that merge, methods that look at singular values or grams are as good as task"
        " arithmetic at its best weight, and one is better; what a merge costs every expert is told"
        " by the term, and ranked beforehand by one pass.",
        study.merging,
        folder="merging",
        lighter=study.lighter,
        documents=("objective/change", "/accuracy"),
    ),
    "atlas": Artefact(
        "Atlas: which edit keeps the model, at which price",
        "For a delta of your size: which edits and codes keep the model, at how many true bits?",
        atlas,
        "answer",
        folder="atlas",
        documents=("objective/change",),
        paper_scale=False,
    ),
    "compression": Artefact(
        "Compression: loss change over true bits",
        "At equal true bits mixed precision of singular vectors loses less than signs and low rank,"
        " signs with a low rank of their rest less than signs, few levels less than DARE; each part"
        " of ImPart, Delta-DCT, D-QRELO and DBMS is worth its place, and so is spreading bits by"
        " the predicted loss change.",
        compression,
        folder="compression",
        documents=("objective/change",),
        original="models of 7B parameters and more",
        paper_scale=False,
    ),
    "sotu": Artefact(
        "SoTU: a stream of tasks on randomly masked deltas",
        "Masked deltas of a stream's experts, 1 - p = 1/T of each, add up to a backbone that scores"
        " above the unmasked sum, the frozen base and sequential fine-tuning, and forgets less than"
        " half of what the latter does; cosines and collisions are those of their closed forms.",
        sotu,
        folder="sotu",
        lighter=without_experts,
        documents=("stream/accuracy", "stream/learned"),
        original="ViT-B/16 on ImageNet-R and others",
        paper_scale=False,
    ),
    "safety": Artefact(
        "Study: edits that restore safety",
        "Safe Delta and IRR bring attack success down to the aligned model's and keep the task,"
        " where as many entries at random do not.",
        safety.safety,
        folder="safety",
        documents=(
            "safety/attack_success",
            "safety/attack_success@post",
            "safety/task",
            "safety/task@post",
        ),
    ),
    "visionfuse": Artefact(
        "VisionFuse: two encoders before one merged language model",
        "The tokens of two vision encoders before one language model, whose fine-tunes for each are"
        " merged, answer questions that need both better than either model by itself.",
        visionfuse,
        folder="visionfuse",
        documents=("/accuracy", "/accuracy@post"),
        original="MGM-8B and SliME-8B of LLaMA-3-8B",
        paper_scale=False,
    ),
}
