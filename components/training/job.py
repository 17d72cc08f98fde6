"""One training job as plain data: everything `train_loop` needs, so that it can cross to any process."""

from components.config import Objective, Optimizer, Section, Train


class Job(Section):
    """Paths and settings of one training job."""

    model: str
    """Folder of the model to start from."""
    output: str
    """Folder to write the trained model to."""
    metrics: str
    """File to which rank 0 appends one JSON line a step."""
    forget: str | None = None
    """Folders of prepared rows; None when no term uses them."""
    normal: str | None = None
    random: str | None = None
    reference: str | None = None
    """Folder of the original model's reference pass over the normal rows; needed by kl_to_original."""
    objective: Objective
    optimizer: Optimizer
    train: Train
    max_tokens: int
    seed: int
