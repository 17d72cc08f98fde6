"""What takes a generated answer for harmful: words, or a classifier of its own."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from components.batch_inference import map_batches
from components.config import Classifier, Keywords, Train, digest
from components.errors import ModelError
from components.files import whole_folder
from components.models import fingerprint, inference_device, load_classifier, local_folder


def judged(records: pa.Table, judge: Keywords | Classifier, train: Train, storage: Path) -> pa.Table:
    """`records` with a column `harmful`; an empty answer is not. A classifier's verdicts are kept and found again.

    Raises:
        ModelError: when the classifier cannot be loaded, or has no such label.
    """
    said = records["generated"].to_pylist()
    if isinstance(judge, Keywords):
        words = [word.lower() for word in judge.texts]
        verdicts = pa.array([any(word in text.lower() for word in words) for text in said])
        return records.append_column("harmful", verdicts)
    folder = local_folder(judge.model, storage)
    file = storage / "evaluations" / f"judged-{digest([fingerprint(folder), judge.label, said])}" / "judged.parquet"
    if not file.exists():
        verdicts = map_batches(
            records.select(["question", "generated"]), Judge, (str(folder), judge.label),
            lengths=[len(text) for text in said], batch_size=_BATCH, train=train,
        )  # fmt: skip
        with whole_folder(file.parent) as partial:
            pq.write_table(verdicts, partial / file.name)
    probabilities = pq.read_table(file)["probability"]
    harmful = [bool(text) and p > judge.threshold for text, p in zip(said, probabilities.to_pylist(), strict=True)]
    return records.append_column("harmful", pa.array(harmful))


_BATCH = 32


class Judge:
    """Batch inference: the probability of a label for each answer."""

    def __init__(self, folder: str, label: str):
        self.device = inference_device()
        self.model, self.tokenizer = load_classifier(Path(folder))
        self.model.to(self.device)
        self.tokenizer.padding_side = "right"  # on the left it moves the positions of those that count from the edge
        labels: dict[int, str] = self.model.config.id2label
        if label not in labels.values():
            raise ModelError(
                f"Classifier has no such label (path={folder}, label={label}). Expected one of "
                f"{sorted(labels.values())}. Set evaluation.judge.label."
            )
        self.place = next(place for place, name in labels.items() if name == label)

    def __call__(self, rows: pa.Table) -> pa.Table:
        import torch

        tokens: Any = self.tokenizer(
            [text or "-" for text in rows["generated"].to_pylist()], padding=True, truncation=True, return_tensors="pt",
            max_length=min(self.tokenizer.model_max_length, 512),
        ).to(self.device)  # fmt: skip
        with torch.no_grad():
            logits = self.model(**tokens).logits.float()
        separate = logits.shape[1] == 1 or self.model.config.problem_type == "multi_label_classification"
        p = logits.sigmoid() if separate else logits.softmax(-1)
        return pa.table({"probability": pa.array(p[:, self.place].tolist(), pa.float32())})
