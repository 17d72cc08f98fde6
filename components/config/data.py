"""Sources and the three sets."""

import string
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from components.config.section import Place, Places, Section
from components.data import filters


class Rows(Section):
    """What to take from each record of a source."""

    prompt: str = "question"
    """Column of the prompt, or a text with columns in braces, such as `"{knowledge}\n{question}"`, not all of them
    empty. A dotted name, such as `passage.text`, reaches into a struct. A column may also hold a list of chat messages,
    each with role and content or from and value."""
    answer: str = "answer"
    """Column of the answer, or a text with columns in braces. A number is text; a list of texts makes a row for each;
    the last one of a list of chat messages is the answer, and those before it belong to the prompt."""
    split_answers: str | None = Field(None, min_length=1)
    """Separator of several answers in one field, such as `"; "`: each makes a row."""
    dialogue: str | None = None
    """Column of a whole dialogue, in place of prompt and answer: a list of chat messages, or text whose turns begin
    with `turns`. Its last turn is the answer."""
    turns: tuple[str, str] = ("\n\nHuman:", "\n\nAssistant:")
    """What a user's and an assistant's turn begin with in a dialogue's text."""
    paraphrased_answer: str | None = None
    """Column with a true answer in other words (evaluation only)."""
    perturbed_answer: str | None = None
    """Column with a list of wrong answers of the same form, or a single one (evaluation only)."""
    choices: str | None = None
    """Column with the options of a multiple choice. `answer` then holds the right one's number, from 0, and the others
    are the wrong answers."""
    letters: bool = False
    """Write the options under the prompt, with letters, and let those be the answers."""
    where: str | None = None
    """Take only records for which this holds, such as `is_safe == false and severity > 1`. Columns stand by name, or
    as `row["a name"]`; the others are counted, not set aside. In CSV every column is text: `is_safe == "false"`,
    `number(severity) > 1`. `components/data/filters.py` says what a filter may hold."""
    requested: Place | None = None
    """Take only records that this file of deletion requests names; `data.requests` sets it."""
    not_requested: str | None = None
    """Leave out records that this file of deletion requests names; `data.requests` sets it."""
    limit: int | None = Field(None, ge=1)
    """Take only the first so many records of each file, before `where`."""

    @field_validator("prompt", "answer")
    @classmethod
    def _braces_hold_columns(cls, text: str) -> str:
        try:
            fields = [name for _, name, *_ in string.Formatter().parse(text) if name is not None]
        except ValueError as error:
            raise ValueError(f"is neither a column nor a text with columns in braces: {error}") from None
        if not all(fields):
            raise ValueError("has empty braces; name a column in them")
        return text

    @model_validator(mode="after")
    def _choices_fit(self) -> "Rows":
        if self.letters and not self.choices:
            raise ValueError("letters are of options: name their column choices")
        if self.choices and (self.perturbed_answer or self.paraphrased_answer or self.split_answers or self.dialogue):
            raise ValueError("choices give right and wrong answers: leave out the other columns of answers")
        return self

    @field_validator("where")
    @classmethod
    def _is_filter(cls, text: str | None) -> str | None:
        if text is not None:
            filters.compiled(text)
        return text


class Files(Rows):
    """Files with one record a line or row, on this machine or in an object store."""

    type: Literal["files"]
    path: Places
    """File, glob or list of them; `s3://` and `gs://` too. JSON lines, JSON, CSV, TSV, Parquet or Arrow, told by the
    suffix; `.gz`, `.bz2`, `.xz` or `.zst` may follow those of text. A JSON array is read whole; lines are streamed."""
    format: Literal["auto", "json", "csv", "parquet", "arrow", "lines"] = "auto"
    """What the suffix does not tell. `lines` makes a record of each line, its column is `text`."""


class HuggingFace(Rows):
    """A data set in Hugging Face's form."""

    type: Literal["huggingface"]
    path: Place
    """Hub id, or a folder written by `datasets.save_to_disk`."""
    subset: str | None = None
    """The hub's configuration name, such as `forget10`."""
    data_dir: Place | None = None
    """The hub's folder to read, such as `harmless-base`."""
    split: str = "train"
    revision: str | None = None
    local: Place | None = None
    """Where the same records lie under `data.folder`; taken instead of the hub when `data.folder` is given."""


class Text(Section):
    """Plain text, cut into windows of tokens: the model goes on from a prefix, without template or EOS."""

    type: Literal["text"]
    path: Places
    """File, glob or list of them; `s3://` and `gs://` too. `.gz`, `.bz2`, `.xz` or `.zst` may follow."""
    prefix_tokens: int = Field(64, ge=1)
    """Tokens that a window begins with, as the prompt."""
    continuation_tokens: int = Field(64, ge=1)
    """Tokens that follow, as the answer."""
    overlap: int = Field(0, ge=0)
    """Tokens that a window shares with the next."""
    limit: int | None = Field(None, ge=1)
    """Take only the first so many lines of each file."""

    @model_validator(mode="after")
    def _windows_move_on(self) -> "Text":
        if self.overlap >= self.prefix_tokens + self.continuation_tokens:
            raise ValueError("overlap must be smaller than prefix_tokens + continuation_tokens")
        return self


class People(Rows):
    """The made-up benchmark: fictional people whose facts no other text holds (see `components/data/people.py`)."""

    type: Literal["people"]
    split: Literal["forget", "normal", "holdout", "general"]
    people: int = Field(120, ge=4)
    """How many people there are, those to forget and the holdout included."""
    forget_people: int = Field(12, ge=1)
    holdout_people: int = Field(12, ge=1)
    seed: int = 0


class FixedAnswers(Section):
    """Answers written in the recipe, to steer towards."""

    type: Literal["fixed"]
    texts: list[str] = Field(min_length=1)
    """Such as `I can't help with that.`"""


Source = Annotated[Files | HuggingFace | Text | People, Field(discriminator="type")]
PoolSource = Annotated[Files | HuggingFace | Text | People | FixedAnswers, Field(discriminator="type")]


class Data(Section):
    """The three sets and how their text becomes tokens."""

    forget: list[Source] = []
    """What the model must forget: prompts and the answers to unlearn."""
    normal: list[Source] = []
    """Behaviour to keep."""
    random: list[PoolSource] = []
    """Pool of unrelated answers; only the answers are used. Another set's answers: name the same sources again."""
    responses: Literal["drawn", "by_row"] = "drawn"
    """drawn: each forget prompt gets responses drawn from `random`. by_row: row i of `random` belongs to row i of
    `forget`, as an alternate answer does; both must have the same rows."""
    folder: Place | None = None
    """Where relative paths of files start, those of evaluation sets too; applied when the recipe is loaded."""
    requests: Place | None = None
    """File of deletion requests (JSON lines with request_id, received, legal_basis and where): of `forget` and of the
    evaluation set of that name only records that they name are taken, everywhere else these are left out; applied when
    the recipe is loaded."""
    template: str | None = Field(None, pattern=r"\{prompt\}")
    """How a prompt is written, such as `"Question: {prompt}\nAnswer:"`. The answer follows after `answer_prefix` and
    ends with EOS. Left out, it is the tokenizer's chat template, or the one shown here where there is none."""
    answer_prefix: str = " "
    """What stands between a prompt by `template` and its answer; counted as answer."""
    system: str | None = None
    """System message in front of every prompt."""
    chat_variables: dict[str, str | bool | int] = {}
    """Further variables of the chat template, such as `date_string` or `enable_thinking`. Some templates need one to
    ask for an answer as they write a finished one."""
    max_tokens: int = Field(256, ge=8)
    """Longest prompt with answer."""
    on_long: Literal["quarantine", "truncate"] = "quarantine"
    """Longer rows are set aside, or their answer loses its end (and with it its EOS)."""
    max_bad_fraction: float = Field(0.01, ge=0, le=1)
    """Stop when more than this share of a set's rows is unusable."""
    overlap: Literal["error", "drop_from_normal", "keep"] = "error"
    """What to do with rows that stand in forget and in normal, letter case and spaces aside."""
    cache: bool = True
    """Keep the three sets' prepared rows for later runs. Without it, they lie in the run's folder while it runs, and
    of the normal set only the first rows are read, as many as the run uses."""
