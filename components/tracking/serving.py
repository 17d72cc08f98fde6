"""A model folder as MLflow's pyfunc, for `mlflow models serve`.

MLflow stores this file and our `components` with the model, and runs them where this package is not installed.
"""

from pathlib import Path
from typing import Any

from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

from components.generation import find_batching, generate_answers, own_generation
from components.models import load_model, load_tokenizer


class Answers(PythonModel):
    """Greedy answers to prompts, written as the model was trained on them."""

    def load_context(self, context: Any) -> None:
        """Load weights and tokenizer, from safetensors only."""
        folder = Path(context.artifacts["model"])
        self.model, self.tokenizer = load_model(folder, "auto"), load_tokenizer(folder)
        self.ends = own_generation(self.model, self.tokenizer)
        self.batching = find_batching(self.model)

    def predict(self, context: Any, model_input: list[str], params: dict[str, Any] | None = None) -> list[str]:
        """One answer per prompt; there are no `params`."""
        prompts = self.tokenizer(list(model_input), return_token_type_ids=False)["input_ids"]
        limits = [context.model_config["max_new_tokens"]] * len(prompts)
        answers = generate_answers(self.model, self.tokenizer, prompts, limits, self.batching, self.ends)
        return [answer for [answer] in answers]


set_model(Answers())
