"""A model folder as MLflow's pyfunc, for `mlflow models serve`. MLflow stores this file with the model and runs it.

It runs where this package is not installed, hence without `components.models`, the door of all other models.
"""

from typing import Any

from mlflow.models import set_model
from mlflow.pyfunc import PythonModel


class Answers(PythonModel):
    """Greedy answers to prompts, written as the model was trained on them."""

    def load_context(self, context: Any) -> None:
        """Load weights and tokenizer, from safetensors only."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = context.artifacts["model"]
        self.tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, padding_side="left"
        )
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, trust_remote_code=False
        ).eval()

    def predict(self, context: Any, model_input: list[str], params: dict[str, Any] | None = None) -> list[str]:
        """One answer a prompt; there are no `params`."""
        inputs = self.tokenizer(model_input, return_tensors="pt", padding=True, return_token_type_ids=False)
        ids = self.model.generate(
            **inputs, max_new_tokens=context.model_config["max_new_tokens"], do_sample=False,
            pad_token_id=self.tokenizer.pad_token_id,
        )  # fmt: skip
        answers = self.tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [answer.strip() for answer in answers]


set_model(Answers())
