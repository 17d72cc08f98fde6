"""The recipe: every setting, its meaning and its default. Nothing here imports torch or Ray.

One schema serves all pipelines, so that one file describes a whole job. A string under a field documents it.
"""

from components.config.data import Data, Files, FixedAnswers, HuggingFace, People, PoolSource, Rows, Source, Text
from components.config.evaluation import Evaluation, EvaluationSet, Gate, Tracking
from components.config.objective import (
    BoundedAscent,
    CeU,
    ForgetTerm,
    GradientAscent,
    JensenShannon,
    KlToOriginal,
    Nll,
    NormalTerm,
    Npo,
    Objective,
    RandomResponse,
    ReverseKl,
    SatImp,
    SimNpo,
    Undial,
    Wga,
)
from components.config.recipe import Recipe, config_hash, registered_name, run_name
from components.config.section import Section, digest
from components.config.training import AdamW, Base, Finetune, Models, Optimizer, Pretrained, Scratch, Soul, Train

__all__ = [
    "AdamW",
    "Base",
    "BoundedAscent",
    "CeU",
    "Data",
    "Evaluation",
    "EvaluationSet",
    "Files",
    "Finetune",
    "FixedAnswers",
    "ForgetTerm",
    "Gate",
    "GradientAscent",
    "HuggingFace",
    "JensenShannon",
    "KlToOriginal",
    "Models",
    "Nll",
    "NormalTerm",
    "Npo",
    "Objective",
    "Optimizer",
    "People",
    "PoolSource",
    "Pretrained",
    "RandomResponse",
    "Recipe",
    "ReverseKl",
    "Rows",
    "SatImp",
    "Scratch",
    "Section",
    "SimNpo",
    "Soul",
    "Source",
    "Text",
    "Tracking",
    "Train",
    "Undial",
    "Wga",
    "config_hash",
    "digest",
    "registered_name",
    "run_name",
]
