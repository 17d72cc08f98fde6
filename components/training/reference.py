"""The original model's part of the KL term, computed once: no second model sits in memory while training."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from components.batch_inference import map_batches
from components.config import Train
from components.data.prepare import Prepared, read_rows
from components.files import whole_folder
from components.models import inference_device, load_model


def reference_pass(model: Path, model_hash: str, normal: Prepared, train: Train, storage: Path) -> Path:
    """Folder with the last hidden states that predict each answer token of `normal`, and the output layer.

    Found again by (model, rows, dtype). `hidden.parquet` has one row per normal row, in order: `hidden` holds
    [answer tokens, hidden size] numbers of the dtype of `head.safetensors`.
    """
    folder = storage / "reference" / f"{model_hash[:16]}-{normal.digest[:16]}-{train.dtype}"
    if folder.exists():
        return folder
    from safetensors.torch import save_file

    rows = read_rows(normal.folder).select(["input_ids", "answer_start"])
    loaded = load_model(model, train.dtype)
    head = loaded.get_output_embeddings()
    tensors = {"weight": head.weight.detach().clone()}
    if getattr(head, "bias", None) is not None:
        tensors["bias"] = head.bias.detach().clone()
    del loaded
    hidden = map_batches(
        rows, HiddenStates, (str(model), train.dtype), lengths=pa.compute.list_value_length(rows["input_ids"]),
        batch_size=4 * train.micro_batch_size, train=train,
    )  # fmt: skip
    with whole_folder(folder) as partial:
        save_file(tensors, partial / "head.safetensors")
        pq.write_table(hidden, partial / "hidden.parquet")
    return folder


class HiddenStates:
    """Batch inference of the model without its output layer."""

    def __init__(self, model: str, dtype: str):
        self.device = inference_device()
        self.model = load_model(Path(model), dtype).to(self.device)

    def __call__(self, rows: pa.Table) -> pa.Table:
        import torch

        ids = [torch.tensor(row, device=self.device) for row in rows["input_ids"].to_pylist()]
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        with torch.no_grad():
            states = self.model.base_model(input_ids=padded, use_cache=False).last_hidden_state
        out = []
        for row, (tokens, start) in enumerate(zip(ids, rows["answer_start"].to_pylist(), strict=True)):
            answer = states[row, start - 1 : len(tokens) - 1].contiguous().cpu()
            out.append(answer.view(torch.uint8).numpy().tobytes())
        return pa.table({"hidden": pa.array(out, pa.large_binary())})
